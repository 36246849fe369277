"""Other programs' clients with their defaults: `make test-clients`; 1 if a check failed.

They ask our own server of the demo's experts (PHATGOOSE_ENGINE_POOL names another pool; without
either some are trained for a minute), or what is at --url: a gateway in front of an engine.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
COMMANDS = {  # each has an environment of its own
    "newest": [ROOT / ".venv-clients-newest/bin/python", HERE / "newest.py"],
    "openai2": [ROOT / ".venv-clients-openai2/bin/python", HERE / "openai2.py"],
    "npm": ["node", HERE / "clients.mjs"],
}
SECONDS = "600"  # a command's


def pool():
    if not os.environ.get("PHATGOOSE_ENGINE_POOL") and (ROOT / "demo/experts").is_dir():
        return ROOT / "demo/experts"
    sys.path.append(str(ROOT / "tests/support"))
    from engines import engine_pool

    return engine_pool(SimpleNamespace(mktemp=lambda name: Path(tempfile.mkdtemp(name))))


def served(experts):
    """(process, address) of our own server, which listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = f"-m phatgoose serve experts={experts} --max-tokens 64 --port {port}".split()
    server = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True)
    for line in server.stderr:
        if "http://" in line:
            return server, f"{line.split()[-1]}/v1"
        sys.stderr.write(line)
    raise SystemExit("The server didn't start.")


def rows_of(group, url, model):
    """What the checks of a group report."""
    environment = {**os.environ, "CLIENTS_URL": url, "CLIENTS_MODEL": model}
    command = ["timeout", SECONDS, *COMMANDS[group]]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE)
    yield from (json.loads(line) for line in done.stdout.splitlines() if line.startswith(b"{"))
    if done.returncode:
        yield {"client": group, "check": "all", "error": f"it ended with {done.returncode}"}


def rows_of_bodies(url, model):
    """The same of bodies that other programs send."""
    head = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
    for each in json.loads((HERE / "bodies.json").read_text()):
        sent, row = json.dumps({**each["body"], "model": model}).encode(), {"client": "recorded"}
        try:
            request = urllib.request.Request(f"{url}/{each['path']}", sent, head)
            said = urllib.request.urlopen(request, timeout=120).read().decode()
        except urllib.error.HTTPError as error:
            said = error.read().decode()
        yield {**row, "check": each["program"], **({"error": said} if '{"error"' in said else {})}


def is_well(rows):
    """Print a line for each client and failure; whether there is none."""
    for client, group in groupby(rows, lambda row: f"{row['client']} {row.get('version', '')}"):
        checks = list(group)
        wrong = [f"    {each['check']}: {each['error']}" for each in checks if "error" in each]
        seconds = sum(each.get("seconds", 0) for each in checks)
        ok = f"{client:40} {len(checks) - len(wrong):2} of {len(checks):2} {seconds:4.0f} s"
        sys.stdout.write("\n".join([ok, *(each[:400].replace("\n", " ") for each in wrong), ""]))
    return not any("error" in each for each in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a server or gateway, as http://localhost:8000/v1")
    parser.add_argument("--model", default="experts")
    parser.add_argument("--skip", nargs="*", default=[], help="checks with these words")
    asked = parser.parse_args()
    server, url = (None, asked.url) if asked.url else served(pool())
    try:
        rows = [row for group in COMMANDS for row in rows_of(group, url, asked.model)]
        rows += rows_of_bodies(url, asked.model)
    finally:
        if server:
            server.terminate()
            server.wait()
    sys.exit(not is_well([r for r in rows if not any(word in r["check"] for word in asked.skip)]))
