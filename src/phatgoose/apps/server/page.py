"""The page at /."""
PAGE = "<!doctype html>"
HEADERS: dict[str, str] = {}
__all__ = ["HEADERS", "PAGE"]
