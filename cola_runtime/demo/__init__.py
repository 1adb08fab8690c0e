"""The demonstration: real text of four tenants, and the report of what training did for them."""

SERVICE_FOLDER = "service"
"""Of the output: the data folder of the service that the demo runs."""
