"""The engine that the settings ask for."""

from megatron_hybrid.online_config import OnlineConfig
from megatron_hybrid.servers.engine import Engine
from megatron_hybrid.servers.sglang import SglangEngine
from megatron_hybrid.servers.vllm import VllmEngine

_ENGINES: dict[str, type[VllmEngine] | type[SglangEngine]] = {"vllm": VllmEngine, "sglang": SglangEngine}


def build_engine(url: str, what: str, online: OnlineConfig) -> Engine:
    """A client; nothing is asked yet."""
    return _ENGINES[online.server_api](
        url,
        what,
        at_once=online.server_requests,
        timeout_s=online.server_timeout,
        retries=online.server_retries,
    )
