-- Posts the files named on the command line in turn, each to the URL's path, or as "FILE PATH" to another. Prints the result as one line of JSON, and then as
-- another the latencies: pairs of microseconds and how many requests took them.

local requests = {}
local turn = 0

function init(files)
   for index, argument in ipairs(files) do
      local name, path = argument:match("^(.*) (/%S*)$")
      local file = assert(io.open(name or argument, "rb"))
      requests[index] = wrk.format("POST", path, nil, file:read("*a"))
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
      '{"requests": %d, "seconds": %.6f, "failed": %d, "refused": %d}',
      summary.requests, summary.duration / 1e6,
      errors.connect + errors.read + errors.write + errors.timeout, errors.status))
   io.flush() -- tells the measuring process at once that the load is over
   local counts = {}
   for index = 1, #latency do
      local microseconds, count = latency(index)
      counts[index] = string.format("[%d, %d]", microseconds, count)
   end
   print("[" .. table.concat(counts, ", ") .. "]")
end
