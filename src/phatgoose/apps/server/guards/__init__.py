"""Guards: who may use the server, how much a request may send, and how long it may take.

access_control.py    host, origin and API key of a request, checked before its body is read
request_guard.py     middleware: bodies are JSON, complete in time, and bounded in size
connection_guard.py  limits on the number of connections and on how long each may wait
"""
