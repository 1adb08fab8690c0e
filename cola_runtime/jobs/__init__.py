"""Jobs: the state machine, the store, the event trail, and the driver that walks a job to its end."""
