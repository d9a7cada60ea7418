"""The same service and its worker with several libraries for jobs.  Run each from the parent folder."""
