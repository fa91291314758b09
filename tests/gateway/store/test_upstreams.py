from __future__ import annotations

from pathlib import Path

import pytest

from inferway_gateway.core.upstream import EndpointSpec, Secret
from inferway_gateway.store.upstreams import UpstreamsError, read_upstreams

MINIMAL = '[[upstreams]]\nname = "a"\nprotocol = "oip"\nendpoints = [{ url = "https://a.example:8000/base/" }]\n'


def none(_: str) -> str | None:
    return None


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "upstreams.toml"
    path.write_text(text)
    return path


def test_what_is_not_said_has_its_default(tmp_path: Path) -> None:
    (spec,) = read_upstreams(write(tmp_path, MINIMAL), none)
    assert spec.endpoints == (EndpointSpec("https://a.example:8000/base", "a.example:8000/base"),)
    assert spec.health_path == "/v2/health/live"
    assert spec.secret is None
    assert spec.allows("anything")
    assert spec.retry_ratio == 0.1


def test_everything_that_is_said_is_taken(tmp_path: Path) -> None:
    text = MINIMAL + (
        'secret = { env = "TOKEN" }\nmodels = ["resnet", "bert-*"]\ntimeout_s = 3\nattempts = 2\nhealth_path = ""\n'
        "binary = false\nmax_in_flight = 7\n"
    )
    (spec,) = read_upstreams(write(tmp_path, text), {"TOKEN": " hush\n"}.get)
    assert spec.secret == Secret("hush")
    assert "hush" not in repr(spec)
    assert [spec.allows(name) for name in ("resnet", "bert-large", "gpt")] == [True, True, False]
    assert (spec.timeout_s, spec.attempts, spec.health_path, spec.binary, spec.max_in_flight) == (3, 2, "", False, 7)


def test_a_file_without_upstreams_has_none(tmp_path: Path) -> None:
    assert read_upstreams(write(tmp_path, ""), none) == ()


def test_a_secret_is_read_from_a_file_of_its_owners_alone(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + 'secret = { file = "secret" }')
    (tmp_path / "secret").write_text("hush\n")
    (tmp_path / "secret").chmod(0o600)
    assert read_upstreams(path, none)[0].secret == Secret("hush")
    (tmp_path / "secret").chmod(0o640)
    with pytest.raises(UpstreamsError, match="others may use its file, expected mode 0600, got 0640"):
        read_upstreams(path, none)


def test_a_secret_goes_in_the_open_only_to_this_machine_or_where_that_is_said(tmp_path: Path) -> None:
    secret = 'secret = { env = "TOKEN" }\n'
    variable = {"TOKEN": "hush"}.get
    for host in ("127.0.0.1:8000", "[::1]:8000", "localhost"):
        read_upstreams(write(tmp_path, MINIMAL.replace("https://a.example:8000", f"http://{host}") + secret), variable)
    open_ = MINIMAL.replace("https:", "http:") + secret
    with pytest.raises(UpstreamsError, match=r"the secret would go to a.example in the open: expected https"):
        read_upstreams(write(tmp_path, open_), variable)
    read_upstreams(write(tmp_path, open_ + "insecure_secret = true\n"), variable)


WRONG = {
    "not-toml": ("[[", "not TOML"),
    "unknown-member": (MINIMAL + "retries = 3", "upstreams.0.retries is not known"),
    "unknown-top": ("upstream = 1", "upstream is not known"),
    "no-endpoint": ('[[upstreams]]\nname = "a"\nprotocol = "oip"\nendpoints = []', "upstreams.0.endpoints"),
    "protocol": (MINIMAL.replace("oip", "grpc"), "upstreams.0.protocol"),
    "name": (MINIMAL.replace('"a"', '"a b"'), "upstreams.0.name"),
    "twice": (MINIMAL * 2, "expected each name once, 'a' is there twice"),
    "scheme": (MINIMAL.replace("https", "ftp"), "expected http://HOST or https://HOST"),
    "no-host": (MINIMAL.replace("a.example", ""), "expected http://HOST or https://HOST"),
    "port": (MINIMAL.replace(":8000", ":80000"), "expected http://HOST or https://HOST"),
    "user": (MINIMAL.replace("//a", "//me:hush@a"), "without user, query and fragment"),
    "query": (MINIMAL.replace("base/", "base?key=hush"), "without user, query and fragment"),
    "control": (MINIMAL.replace("base/", "ba se"), "expected http://HOST or https://HOST"),
    "weight": (MINIMAL.replace('/" }', '/", weight = 0 }'), "weight"),
    "two-secrets": (MINIMAL + 'secret = { env = "A", file = "b" }', "expected one of 'env' and 'file'"),
    "secret-in-it": (MINIMAL + 'secret = "hush"', "upstreams.0.secret"),
    "no-variable": (MINIMAL + 'secret = { env = "TOKEN" }', "in the variable TOKEN, which is not set"),
    "no-secret-file": (MINIMAL + 'secret = { file = "none" }', "cannot read its file: No such file"),
    "infinite": (MINIMAL + "timeout_s = inf", "timeout_s"),
    "no-certificates": (MINIMAL + 'ca_file = "none.pem"', "file of certificates of upstream 'a'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_and_no_secret_is_told(tmp_path: Path, name: str) -> None:
    text, words = WRONG[name]
    with pytest.raises(UpstreamsError, match=words) as caught:
        read_upstreams(write(tmp_path, text), none)
    assert "hush" not in str(caught.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UpstreamsError, match=r"upstreams \S+/none.toml: No such file"):
        read_upstreams(tmp_path / "none.toml", none)


@pytest.mark.parametrize("value", ["", "ü", "a\nb"], ids=["empty", "not-ascii", "two-lines"])
def test_a_secret_fits_a_header(tmp_path: Path, value: str) -> None:
    with pytest.raises(UpstreamsError, match="secret of upstream 'a'"):
        read_upstreams(write(tmp_path, MINIMAL + 'secret = { env = "TOKEN" }'), lambda _: value)
