export PYTHONPATH=/tmp/w/E/api:/tmp/w/E/migration:/tmp/w/E/engine VLLM_CACHE_ROOT=/root/.cache/llmfleet/engine-6a9882427f482a1d/venv/vllm-cache HF_HUB_OFFLINE=1 USER=engine PATH=/root/.cache/llmfleet/engine-6a9882427f482a1d/venv/bin:/usr/bin:/bin LLMFLEET_TEST_TP=2 VLLM_CPU_OMP_THREADS_BIND="0|1"
exec /root/.cache/llmfleet/engine-6a9882427f482a1d/venv/bin/python "$@"
