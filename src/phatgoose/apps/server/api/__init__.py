"""The protocol: requests and responses in OpenAI's form.

app.py                  The FastAPI application and its routes
service.py              What the routes call: finds the model, prepares the request, starts it
request_schema.py       Request bodies: OpenAI's fields, and ours for routing
request_parsing.py      A body's bytes to a validated request, at bounded cost
request_preparation.py  A request's prompts as tokens and its decoding settings, checked
pending_reply.py        One request while its answers are computed: whole or as a stream
response_builders.py    Progress to JSON: whole responses and chunks of a stream
response_schema.py      Response bodies
openapi.py              Error handlers, and an OpenAPI schema that describes them
page.py                 The page at /: a prompt, answers that stream, and each token's experts
page.html.jinja         its structure
page.css                its style
page.js                 its behaviour
"""
