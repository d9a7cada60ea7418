-- Prints the line that http_load.py parses: requests, microseconds, p50, p99, errors.
done = function(summary, latency, requests)
   local e = summary.errors
   local errors = e.connect + e.read + e.write + e.status + e.timeout
   io.write(string.format("%d %d %d %d %d\n",
      summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), errors))
end
