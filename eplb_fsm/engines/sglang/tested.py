"""The versions of SGLang that the adapter was tested with, and what it replaces and relies on in each of them.

``python tools/fingerprint_engine.py sglang``, with that version installed, writes the fingerprints anew.
"""

from __future__ import annotations

from eplb_fsm.engines.fingerprints import Fingerprints

TESTED: dict[str, Fingerprints] = {
    "0.5.23": {
        "sglang.srt.eplb.eplb_manager:EPLBManager": "360da73034461922",
        "sglang.srt.eplb.expert_distribution:_ExpertDistributionRecorderReal": "efd573f57a9092e7",
        "sglang.srt.eplb.expert_distribution:_StatAccumulator": "f04b941bb0971662",
        "sglang.srt.eplb.expert_distribution:_Buffer": "5bdfc4f2c85e786d",
        "sglang.srt.eplb.expert_location:ExpertLocationMetadata": "f577079ca6773bdd",
        "sglang.srt.eplb.expert_location_dispatch:ExpertLocationDispatchInfo": "642ae114c212a0d7",
        "sglang.srt.eplb.expert_location_dispatch:topk_ids_logical_to_physical": "29140505ce1281f1",
        "sglang.srt.elastic_ep.elastic_ep:maybe_rebalance_after_rank_fault": "d5225317c0115a69",
        "sglang.srt.elastic_ep.elastic_ep:maybe_recover_ep_ranks": "69cd38f22b353d5c",
        "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager": "b86516ac40a00165",
        "sglang.srt.model_executor.model_runner:ModelRunner.initialize": "34f1002a1e2ca36f",
        "sglang.srt.model_executor.model_runner:ModelRunner.maybe_init_eplb_manager": "929351120dbd291c",
        "sglang.srt.plugins.hook_registry:HookRegistry": "3af4a3030608934d",
        "sglang.srt.model_executor.model_runner:ModelRunner.forward": "0e88a6b4867b9a5b",
    },
}
