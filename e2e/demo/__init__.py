"""The whole product on one machine: `make demo` and `make demo-down`.

Flows in: a local cluster (or the one in KUBECONFIG), the manifests of `examples/demo`, a real vLLM. Flows out: the
story of the README as it happens, `build/demo.json`, and an exit code that is zero only if every claim of it held.

    session     what outlives the command (cluster, operator, gateway) and how it is ended
    manifests   examples/demo with this machine's paths filled in
    traffic     clients: the printed stream, the background load, the long streams that must survive
    scenario    the story, step by step
    report      its last line and JSON
"""
