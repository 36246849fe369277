"""The protocol: requests and responses in OpenAI's form.

app.py                  the FastAPI application and its routes
service.py              what the routes call: finds the model, prepares the request, starts it
request_schema.py       request bodies: OpenAI's fields, and ours for routing
request_parsing.py      a body's bytes to a validated request, at bounded cost
readers.py              threads that turn requests into tokens, a few at a time
request_preparation.py  a request's prompts as tokens and its decoding settings, checked
pending_reply.py        one request while its answers are computed: whole or as a stream
response_builders.py    progress to JSON: whole responses and chunks of a stream
response_schema.py      response bodies
openapi.py              error handlers, and an OpenAPI schema that describes them
page.py                 the page at /: a prompt, answers that stream, and each token's experts
page.html.jinja         its structure
page.css                its style
page.js                 its behaviour
"""
