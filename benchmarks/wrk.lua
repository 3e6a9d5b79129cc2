-- Posts the files named on the command line in turn, and prints the result as one line of JSON.

local requests = {}
local turn = 0

function init(files)
   for index, name in ipairs(files) do
      local file = assert(io.open(name, "rb"))
      requests[index] = wrk.format("POST", nil, nil, file:read("*a"))
      file:close()
   end
end

function request()
   turn = turn % #requests + 1
   return requests[turn]
end

function done(summary, latency)
   local errors = summary.errors
   print(string.format(
      '{"requests": %d, "seconds": %.6f, "failed": %d, "refused": %d,' ..
      ' "p50": %.3f, "p90": %.3f, "p99": %.3f, "longest": %.3f}',
      summary.requests, summary.duration / 1e6,
      errors.connect + errors.read + errors.write + errors.timeout, errors.status,
      latency:percentile(50) / 1e3, latency:percentile(90) / 1e3, latency:percentile(99) / 1e3,
      latency.max / 1e3))
end
