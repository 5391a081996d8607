"""A model changed: other norms, frozen ones, domains, fused, exported."""
