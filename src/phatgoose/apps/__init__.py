"""What people run: the command line, demo, server and Ray.

generation.py  text from a routed model, with the experts behind each token
console.py     what a person reads in a terminal
tables.py      results as tables
processor.py   threads, cores and how they wait
grammars.py    a process that compiles a client's grammar within limits
cli/           the command
demo.py        the whole story in minutes
server/        models over HTTP
deploy.py      a folder that starts another engine and the gateway
ray_engine.py  experts and runs on a cluster
"""
