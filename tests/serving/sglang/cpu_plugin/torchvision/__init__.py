"""A stand-in for torchvision, whose published wheel needs CUDA's libraries as soon as it is imported.

SGLang imports it at the top of its configurations of multimodal models; a language model calls nothing of it.
"""

from sglang_on_cpu.absent import stand_in

__getattr__ = stand_in(__name__)
