"""What is no request, or could be read as two different ones, gets its exact status and a closed connection.

Each case goes over a socket whole and byte by byte; both have to end alike.
"""

from __future__ import annotations

import json

import pytest

from raw_edge import RunningEdge

HOST = b"Host: gateway\r\n"


def get(headers: bytes = HOST, target: bytes = b"/x", version: bytes = b"HTTP/1.1") -> bytes:
    return b"GET " + target + b" " + version + b"\r\n" + headers + b"\r\n"


def post(headers: bytes, body: bytes = b"") -> bytes:
    return b"POST /x HTTP/1.1\r\n" + HOST + headers + b"\r\n" + body


def chunked(body: bytes, headers: bytes = b"") -> bytes:
    return post(headers + b"Transfer-Encoding: chunked\r\n", body)


FINE = {
    "get": (get(), b""),
    "host-with-port": (get(b"Host: gateway:8080\r\n"), b""),
    "host-ipv4": (get(b"Host: 127.0.0.1:1\r\n"), b""),
    "host-ipv6": (get(b"Host: [::1]:8080\r\n"), b""),
    "host-empty-port": (get(b"Host: gateway:\r\n"), b""),
    "host-after-others": (get(b"A: b\r\n" + HOST), b""),
    "host-spaces-around": (get(b"Host:   gateway  \r\n"), b""),
    "host-upper-case-name": (get(b"HOST: gateway\r\n"), b""),
    "host-underscore": (get(b"Host: my_gateway\r\n"), b""),
    "no-space-after-colon": (get(b"Host:gateway\r\n"), b""),
    "crlf-before-request": (b"\r\n\r\n" + get(), b""),
    "lf-before-request": (b"\n" + get(), b""),
    "absolute-target": (get(target=b"http://other/x?y=1"), b""),
    "absolute-target-no-path": (get(target=b"http://other"), b""),
    "two-slashes": (get(target=b"//x"), b""),
    "query": (get(target=b"/x?a=b&c=%00"), b""),
    "percent-odd": (get(target=b"/%zz"), b""),
    "percent-nul": (get(target=b"/%00"), b""),
    "options-asterisk": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", b""),
    "empty-header-value": (get(HOST + b"A:\r\n"), b""),
    "obs-text-in-value": (get(HOST + b"A: \xe4\xff\r\n"), b""),
    "tab-in-value": (get(HOST + b"A: b\tc\r\n"), b""),
    "same-harmless-header-twice": (get(HOST + b"Accept: a\r\nAccept: b\r\n"), b""),
    "cookie-twice": (get(HOST + b"Cookie: a=b\r\nCookie: c=d\r\n"), b""),
    "hundred-headers": (get(HOST + b"".join(b"H%d: v\r\n" % i for i in range(99))), b""),
    "longest-header": (get(HOST + b"A: " + b"v" * (16_384 - 43) + b"\r\n"), b""),
    "body": (post(b"Content-Length: 3\r\n", b"abc"), b"abc"),
    "body-on-get": (get(HOST + b"Content-Length: 3\r\n") + b"abc", b"abc"),
    "body-empty": (post(b"Content-Length: 0\r\n"), b""),
    "body-undeclared": (post(b""), b""),
    "length-with-zeros": (post(b"Content-Length: 0003\r\n", b"abc"), b"abc"),
    "length-spaces-around": (post(b"Content-Length:  3 \r\n", b"abc"), b"abc"),
    "body-nul": (post(b"Content-Length: 3\r\n", b"\0\r\n"), b"\0\r\n"),
    "chunks": (chunked(b"3\r\nabc\r\n0\r\n\r\n"), b"abc"),
    "chunks-two": (chunked(b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"), b"abc"),
    "chunks-none": (chunked(b"0\r\n\r\n"), b""),
    "chunk-size-upper-case": (chunked(b"A\r\n0123456789\r\n0\r\n\r\n"), b"0123456789"),
    "chunk-size-zeros": (chunked(b"0003\r\nabc\r\n000\r\n\r\n"), b"abc"),
    "chunk-extension": (chunked(b'3;a=b;c="d"\r\nabc\r\n0;x\r\n\r\n'), b"abc"),
    "chunk-trailer": (chunked(b"3\r\nabc\r\n0\r\nDigest: x\r\n\r\n"), b"abc"),
    "chunk-trailer-with-key": (chunked(b"3\r\nabc\r\n0\r\nAuthorization: x\r\n\r\n"), b"abc"),
    "coding-upper-case": (post(b"Transfer-Encoding: CHUNKED\r\n", b"3\r\nabc\r\n0\r\n\r\n"), b"abc"),
    "http-1.0": (get(version=b"HTTP/1.0"), b""),
    "http-1.0-without-host": (get(b"", version=b"HTTP/1.0"), b""),
    "http-1.0-body": (b"POST /x HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
    "connection-close": (get(HOST + b"Connection: close\r\n"), b""),
    "connection-keep-alive": (get(HOST + b"Connection: keep-alive\r\n"), b""),
    "connection-unknown": (get(HOST + b"Connection: X-Foo\r\n"), b""),
    "upgrade-h2c-is-ignored": (
        post(
            b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\nContent-Length: 3\r\n",
            b"abc",
        ),
        b"abc",
    ),
    "upgrade-without-body": (get(HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n"), b""),
    "upgrade-header-alone": (get(HOST + b"Upgrade: h2c\r\n"), b""),
    "expect-continue-with-body": (post(b"Expect: 100-continue\r\nContent-Length: 3\r\n", b"abc"), b"abc"),
    "expect-unknown": (post(b"Expect: miracles\r\nContent-Length: 3\r\n", b"abc"), b"abc"),
    "method-put": (b"PUT /x HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\n\r\na", b"a"),
    "method-delete": (b"DELETE /x HTTP/1.1\r\n" + HOST + b"\r\n", b""),
    "method-trace": (b"TRACE /x HTTP/1.1\r\n" + HOST + b"\r\n", b""),
    "method-propfind": (b"PROPFIND /x HTTP/1.1\r\n" + HOST + b"\r\n", b""),
}

ONCE = "Authorization X-API-Key Content-Type Content-Encoding Inference-Header-Content-Length Inferway-Timeout-Ms"
ONCE += " Idempotency-Key X-Request-Id Expect"

REFUSED = {
    # Host
    "host-missing": (get(b""), 400),
    "host-missing-other-headers": (get(b"A: b\r\n"), 400),
    "host-twice": (get(HOST + HOST), 400),
    "host-twice-other-case": (get(HOST + b"hOST: other\r\n"), 400),
    "host-empty": (get(b"Host:\r\n"), 400),
    "host-blank": (get(b"Host:  \r\n"), 400),
    "host-two-names": (get(b"Host: a, b\r\n"), 400),
    "host-with-space": (get(b"Host: a b\r\n"), 400),
    "host-with-path": (get(b"Host: a/b\r\n"), 400),
    "host-with-user": (get(b"Host: a@b\r\n"), 400),
    "host-with-scheme": (get(b"Host: http://a\r\n"), 400),
    "host-with-query": (get(b"Host: a?b\r\n"), 400),
    "host-with-fragment": (get(b"Host: a#b\r\n"), 400),
    "host-bad-port": (get(b"Host: a:b\r\n"), 400),
    "host-long-port": (get(b"Host: a:123456\r\n"), 400),
    "host-half-bracket": (get(b"Host: [::1\r\n"), 400),
    "host-not-ascii": (get(b"Host: \xc3\xa4\r\n"), 400),
    "host-quote": (get(b'Host: "a"\r\n'), 400),
    "host-backslash": (get(b"Host: a\\b\r\n"), 400),
    "host-missing-in-chunked": (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    # Repeated headers
    **{f"{name.lower()}-twice": (get(HOST + f"{name}: 1\r\n{name}: 1\r\n".encode()), 400) for name in ONCE.split()},
    "authorization-twice-other-case": (get(HOST + b"Authorization: a\r\nAUTHORIZATION: b\r\n"), 400),
    # Length and coding
    "length-and-coding": (post(b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"), 400),
    "coding-and-length": (post(b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", b"0\r\n\r\n"), 400),
    "length-zero-and-coding": (post(b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"), 400),
    "length-twice": (post(b"Content-Length: 3\r\nContent-Length: 3\r\n", b"abc"), 400),
    "length-twice-different": (post(b"Content-Length: 3\r\nContent-Length: 4\r\n", b"abcd"), 400),
    "length-list": (post(b"Content-Length: 3, 3\r\n", b"abc"), 400),
    "length-plus": (post(b"Content-Length: +3\r\n", b"abc"), 400),
    "length-minus": (post(b"Content-Length: -3\r\n", b"abc"), 400),
    "length-hex": (post(b"Content-Length: 0x3\r\n", b"abc"), 400),
    "length-float": (post(b"Content-Length: 3.0\r\n", b"abc"), 400),
    "length-exponent": (post(b"Content-Length: 3e0\r\n", b"abc"), 400),
    "length-empty": (post(b"Content-Length:\r\n", b"abc"), 400),
    "length-word": (post(b"Content-Length: three\r\n", b"abc"), 400),
    "length-space-inside": (post(b"Content-Length: 3 3\r\n", b"abc"), 400),
    "length-underscore": (post(b"Content-Length: 1_0\r\n", b"abcdefghij"), 400),
    "length-overflow": (post(b"Content-Length: 18446744073709551616\r\n"), 400),
    "length-huge": (post(b"Content-Length: " + b"9" * 60 + b"\r\n"), 400),
    "length-unicode-digit": (post("Content-Length: ３\r\n".encode(), b"abc"), 400),
    "length-nul": (post(b"Content-Length: 3\0\r\n", b"abc"), 400),
    "coding-twice": (post(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"), 400),
    "coding-chunked-not-last": (post(b"Transfer-Encoding: chunked, gzip\r\n", b"0\r\n\r\n"), 400),
    "coding-chunked-twice": (post(b"Transfer-Encoding: chunked, chunked\r\n", b"0\r\n\r\n"), 400),
    "coding-with-vertical-tab": (post(b"Transfer-Encoding: \x0bchunked\r\n", b"0\r\n\r\n"), 400),
    "coding-with-nul": (post(b"Transfer-Encoding: chunked\0\r\n", b"0\r\n\r\n"), 400),
    "coding-folded": (post(b"Transfer-Encoding:\r\n chunked\r\n", b"0\r\n\r\n"), 400),
    "coding-space-before-colon": (post(b"Transfer-Encoding : chunked\r\n", b"0\r\n\r\n"), 400),
    "coding-unknown-then-chunked": (post(b"Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n"), 501),
    "coding-http-1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    # Chunks
    "chunk-size-missing": (chunked(b"\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk-size-word": (chunked(b"three\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk-size-minus": (chunked(b"-3\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk-size-plus": (chunked(b"+3\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk-size-hex-prefix": (chunked(b"0x3\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk-size-space-before": (chunked(b" 3\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk-size-space-after": (chunked(b"3 \r\nabc\r\n0\r\n\r\n"), 400),
    "chunk-size-underscore": (chunked(b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n"), 400),
    "chunk-size-overflow": (chunked(b"fffffffffffffffff\r\nabc"), 400),
    "chunk-size-bare-lf": (chunked(b"3\nabc\r\n0\r\n\r\n"), 400),
    "chunk-size-bare-cr": (chunked(b"3\rabc\r\n0\r\n\r\n"), 400),
    "chunk-data-longer": (chunked(b"3\r\nabcd\r\n0\r\n\r\n"), 400),
    "chunk-data-without-end": (chunked(b"3\r\nabc0\r\n\r\n"), 400),
    "chunk-data-bare-lf": (chunked(b"3\r\nabc\n0\r\n\r\n"), 400),
    "chunk-extension-nul": (chunked(b"3;a\0b\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk-extension-bare-lf": (chunked(b"3;a\nabc\r\n0\r\n\r\n"), 400),
    "chunk-trailer-folded": (chunked(b"0\r\nA: b\r\n c\r\n\r\n"), 400),
    "chunk-trailer-nul": (chunked(b"0\r\nA: b\0c\r\n\r\n"), 400),
    "chunk-trailer-without-colon": (chunked(b"0\r\nA\r\n\r\n"), 400),
    "chunk-extension-endless": (chunked(b"3;" + b"a" * 40_000), 400),
    "chunk-trailers-endless": (chunked(b"0\r\nA: " + b"a" * 40_000), 400),
    "chunk-trailers-many": (chunked(b"0\r\n" + b"A: b\r\n" * 102), 400),
    # Header syntax
    "fold-space": (get(HOST + b"A: b\r\n c\r\n"), 400),
    "fold-tab": (get(HOST + b"A: b\r\n\tc\r\n"), 400),
    "fold-first-line": (get(b" A: b\r\n" + HOST), 400),
    "space-before-colon": (get(HOST + b"A : b\r\n"), 400),
    "tab-before-colon": (get(HOST + b"A\t: b\r\n"), 400),
    "name-empty": (get(HOST + b": b\r\n"), 400),
    "name-without-colon": (get(HOST + b"A\r\n"), 400),
    "name-with-space": (get(HOST + b"A B: c\r\n"), 400),
    "name-with-bracket": (get(HOST + b"A(: b\r\n"), 400),
    "name-with-quote": (get(HOST + b'A": b\r\n'), 400),
    "name-with-nul": (get(HOST + b"A\0: b\r\n"), 400),
    "name-not-ascii": (get(HOST + b"\xc3\xa4: b\r\n"), 400),
    "name-del": (get(HOST + b"A\x7f: b\r\n"), 400),
    "value-nul": (get(HOST + b"A: b\0c\r\n"), 400),
    "value-control": (get(HOST + b"A: b\x01c\r\n"), 400),
    "value-escape": (get(HOST + b"A: \x1b[31m\r\n"), 400),
    "value-del": (get(HOST + b"A: b\x7fc\r\n"), 400),
    "value-bare-cr": (get(HOST + b"A: b\rc\r\n"), 400),
    "line-end-bare-lf": (get(b"Host: a\nA: b\n"), 400),
    "last-line-bare-lf": (b"GET /x HTTP/1.1\r\nHost: a\r\n\n", 400),
    # Request line
    "line-end-bare-lf-first": (b"GET /x HTTP/1.1\nHost: a\r\n\r\n", 400),
    "line-end-bare-cr-first": (b"GET /x HTTP/1.1\rHost: a\r\n\r\n", 400),
    "method-lower-case": (b"get /x HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "method-unknown": (b"FETCH /x HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "method-nul": (b"GE\0T /x HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "method-connect": (b"CONNECT other:443 HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "space-before-method": (b" GET /x HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "target-missing": (b"GET HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "target-with-space": (get(target=b"/a b"), 400),
    "target-control": (get(target=b"/a\x01b"), 400),
    "target-nul": (get(target=b"/a\0b"), 400),
    "target-not-ascii": (get(target=b"/\xc3\xa4"), 400),
    "target-fragment": (get(target=b"/x#y"), 400),
    "target-relative": (get(target=b"x"), 400),
    "target-backslash": (get(target=b"\\x"), 400),
    "version-missing": (b"GET /x\r\n" + HOST + b"\r\n", 400),
    "version-0.9": (get(version=b"HTTP/0.9"), 400),
    "version-1.2": (get(version=b"HTTP/1.2"), 400),
    "version-2.0": (get(version=b"HTTP/2.0"), 400),
    "version-3": (get(version=b"HTTP/3"), 400),
    "version-lower-case": (get(version=b"http/1.1"), 400),
    "version-space-after": (get(version=b"HTTP/1.1 "), 400),
    "version-other-protocol": (get(version=b"HTTQ/1.1"), 400),
    "http-2-preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "tls-client-hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "binary-noise": (bytes(range(128, 256)), 400),
    "upgrade-chunked": (
        chunked(b"0\r\n\r\n", b"Connection: Upgrade\r\nUpgrade: h2c\r\n"),
        501,
    ),
    # Size
    "too-many-headers": (get(HOST + b"".join(b"H%d: v\r\n" % i for i in range(100))), 431),
    "too-many-headers-by-far": (get(HOST + b"a:\r\n" * 3000), 431),
    "header-too-long": (get(HOST + b"A: " + b"v" * 16_384 + b"\r\n"), 431),
    "header-name-too-long": (get(HOST + b"A" * 16_384 + b": v\r\n"), 431),
    "target-too-long": (get(target=b"/" + b"x" * 16_384), 431),
    "header-endless": (b"GET /x HTTP/1.1\r\n" + HOST + b"A: " + b"v" * 40_000, 431),
    "headers-endless": (b"GET /x HTTP/1.1\r\n" + HOST + b"A: v\r\n" * 7_000, 431),
    "second-header-too-long": (get() + get(HOST + b"A: " + b"v" * 33_000 + b"\r\n"), 431),
}
_CODES = {400: "malformed_request", 431: "headers_too_large", 501: "unsupported"}


@pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "bytewise"])
@pytest.mark.parametrize("case", FINE)
def test_a_request_is_answered_and_the_next_one_too(edge: RunningEdge, case: str, bytewise: bool) -> None:
    request, body = FINE[case]
    with edge.client() as client:
        client.send(request, bytewise=bytewise)
        answer = client.read()
        if answer.status == 100:
            answer = client.read()
        assert (answer.status, answer.body) == (200, body)
        if answer.headers.get("connection") == "close":
            assert client.ended
        else:
            client.send(post(b"Content-Length: 2\r\n", b"ok"))
            assert client.read().body == b"ok"


@pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "bytewise"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_request_is_refused_and_the_connection_closed(edge: RunningEdge, case: str, bytewise: bool) -> None:
    request, status = REFUSED[case]
    with edge.client() as client:
        # A request behind it would show a connection that goes on, or bytes read in another meaning.
        client.send(request + (b"" if bytewise else get(target=b"/smuggled")), bytewise=bytewise)
        if case.startswith("second-"):
            assert client.read().status == 200
        answer = client.read()
        assert answer.status == status, answer
        assert answer.headers["connection"] == "close"
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-should-retry"] == "false"
        body = answer.json
        assert body.keys() == {"error", "code", "request_id"}
        assert body["code"] == _CODES[status]
        assert answer.headers["x-request-id"] == body["request_id"]
        assert client.ended
    assert ("GET", "/smuggled") not in edge.calls


def test_there_are_as_many_cases_as_promised() -> None:
    assert len(FINE) + len(REFUSED) >= 120


def test_the_refusal_carries_the_callers_request_id_where_it_was_read(edge: RunningEdge) -> None:
    with edge.client() as client:
        client.send(chunked(b"zz\r\n", b"X-Request-Id: mine-1\r\n"))
        answer = client.read()
        assert answer.headers["x-request-id"] == answer.json["request_id"] == "mine-1"


def test_trailers_are_not_taken_for_headers(edge: RunningEdge) -> None:
    with edge.client() as client:
        client.send(chunked(b"0\r\nHost: other\r\nAuthorization: x\r\n\r\n") + get(b"Host: gateway\r\n"))
        assert client.read().status == 200
        assert client.read().status == 200


def test_an_error_waits_for_the_answers_before_it(edge: RunningEdge) -> None:
    with edge.client() as client:
        client.send(post(b"Content-Length: 1\r\n", b"1") + post(b"Content-Length: 1\r\n", b"2") + b"GARBAGE\r\n\r\n")
        assert client.read().body == b"1"
        assert client.read().body == b"2"
        last = client.read()
        assert json.loads(last.body)["code"] == "malformed_request"
        assert client.ended
