"""The demonstration: real text of four tenants, and the report of what training did for them."""
