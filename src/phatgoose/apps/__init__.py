"""What people run: the command line, demo, report, server, Ray and lm-eval.

generation.py  text from a routed model, with the experts behind each token
console.py     what a person reads in a terminal
tables.py      results as tables
processor.py   threads, cores and how they wait
cli/           the command
demo.py        the whole story in minutes
report/        an analysis as one HTML page
server/        models over HTTP
deploy.py      a folder that starts another engine and the gateway
vllm/          routing inside vLLM
ray_engine.py  experts and runs on a cluster
"""
