"""The protocol: requests in OpenAI's form, and replies.

answers.py       From progress to JSON: whole answers and chunks of a stream, for completions and fo
app.py           The application: its routes, and who is let in where
jobs.py          One request at work: its rows in the engine, what they tell, and what happens at th
page.css
page.html.jinja
page.js
page.py          The page at /: a prompt, answers that stream, and who served each of their tokens
parsing.py       From a body to a request: read by a parser that bounds what it may cost, refused in
prompts.py       From requests to prompts: the tokens that a model is given, checked against what it
protocol.py      The requests that are understood: OpenAI's fields, and ours for routing
replies.py       The answers' JSON, as models that the schema is made of
schema.py        Errors in OpenAI's form, and an OpenAPI schema that says so
service.py       What the routes ask for: models by name, and requests turned into jobs
"""
