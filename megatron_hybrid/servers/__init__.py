"""Clients of the servers that a run may depend on; no torch, no model.

json_server.py   JSON over HTTP: retries, time, one clear error        engine.py   what an inference engine can do
http_engine.py   what the clients of engines share
vllm.py          the engine's OpenAI-compatible server                 sglang.py   the engine's native server
bounded.py       what a connection promises    build.py   the engine that the settings ask for
"""
