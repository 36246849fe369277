"""llama-server from xllamacpp, as a program: BASE.gguf PORT SLOTS CONTEXT THREADS NAME.gguf …

It goes on until it is killed or its input ends.
"""

import sys

import xllamacpp


def main(base: str, port: str, slots: str, context: str, threads: str, *adapters: str) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = base
    params.hostnames, params.port = ["127.0.0.1"], int(port)
    params.n_parallel = int(slots)
    params.n_ctx = int(context)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.n_threads_http = 70
    params.warmup = False
    params.cache_ram_mib = 0
    params.fit_params = False
    # xllamacpp doesn't heed lora_init_without_apply; every request of a gateway names all scales.
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in adapters]
    server = xllamacpp.Server(params)  # it serves as long as this object is there
    sys.stdout.write(f"ready {server.listening_address}\n")
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
