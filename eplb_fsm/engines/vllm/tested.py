"""The versions of vLLM that the adapter was tested with, and what it replaces and relies on in each of them.

``python tools/fingerprint_engine.py vllm``, with that version installed, writes the fingerprints anew.
"""

from __future__ import annotations

from eplb_fsm.engines.fingerprints import Fingerprints

TESTED: dict[str, Fingerprints] = {
    "0.32.0": {
        "vllm.config.parallel:EPLBConfig": "4db0a9f8760c5a69",
        "vllm.distributed.elastic_ep.elastic_execute:ElasticEPScalingExecutor.broadcast_expert_mapping": "424c65ad52b092a7",
        "vllm.distributed.elastic_ep.elastic_execute:ElasticEPScalingExecutor._perform_eplb_reshuffle": "fdd3c513efb11ef2",
        "vllm.distributed.eplb.eplb_state:EplbModelState": "cecc02a5507876cd",
        "vllm.distributed.eplb.eplb_state:EplbState": "fdc0d27101ad84b0",
        "vllm.distributed.eplb.eplb_state:_compute_eplb_load_stats": "0d25f75ab54460b3",
        "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts.forward_modular": "1f7fddca268e1d57",
        "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts.get_expert_weights": "f9895132eddab3c9",
        "vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter._apply_eplb_mapping": "73f4237eecde49ec",
        "vllm.model_executor.models.interfaces:MixtureOfExperts.set_eplb_state": "474e28d3515c1368",
        "vllm.v1.worker.gpu.eplb_utils:EPLBController": "9eb80f33012652b9",
        "vllm.v1.worker.gpu.eplb_utils:step_eplb_after": "9a2efa993244aeba",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner._dummy_run": "7895713aa96c5a87",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens": "090145d5207ddc7b",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.eplb_step": "0d3647f213392f64",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.load_model": "bc7aa382d6a3c544",
    },
}
