"""Recording what happens when, in every process, and reading it: spans, Chrome's trace format, a report."""
