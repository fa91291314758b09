-- Sends the requests that a description file lists, over and over, and prints one line of JSON at the end.
-- The description is a Lua file that returns {path=, headers={}, bodies={file, ...}}; see load.py, which writes it.
local requests, next_one = {}, 0

function init(args)
  local job = dofile(args[1])
  for i, file in ipairs(job.bodies) do
    local handle = assert(io.open(file, "rb"))
    local body = handle:read("*a")
    handle:close()
    local headers = {}
    for name, value in pairs(job.headers) do headers[name] = value end
    for name, value in pairs(job.own_headers[i] or {}) do headers[name] = value end
    requests[i] = wrk.format(job.method, job.path, headers, body)
  end
end

function request()
  next_one = next_one % #requests + 1
  return requests[next_one]
end

function done(summary, latency, _)
  io.write(string.format(
    '{"requests":%d,"duration_us":%d,"bytes":%d,"bad_status":%d,"connect":%d,"read":%d,"write":%d,"timeout":%d,'
    .. '"p50_us":%d,"p90_us":%d,"p99_us":%d,"max_us":%d,"mean_us":%.1f}\n',
    summary.requests, summary.duration, summary.bytes, summary.errors.status, summary.errors.connect,
    summary.errors.read, summary.errors.write, summary.errors.timeout,
    latency:percentile(50), latency:percentile(90), latency:percentile(99), latency.max, latency.mean))
end
