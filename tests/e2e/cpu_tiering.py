"""vLLM's tiered offloading on a CPU: its own worker refuses every platform but CUDA-alike and XPU, so tests bring this one."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CopyingWorker(OffloadingWorker):
    """Copies between the engine's KV tensors and the CPU tier, at once and in the calling thread."""

    def __init__(self, kv_caches: Any, region: SharedOffloadRegion, blocks_per_chunk: int) -> None:
        self._region = region
        self._per_chunk = blocks_per_chunk
        self._groups = kv_caches.group_data_refs
        self._pages = [t.tensor.view(torch.int8).view(-1, t.page_size_bytes) for t in kv_caches.tensors]
        self._rows = [region.create_next_worker_view(t.page_size_bytes * blocks_per_chunk) for t in kv_caches.tensors]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for page, row in self._pairs(src_spec, dst_spec):
            row.copy_(page)
        self._done.append(TransferResult(job_id, True, 0, 1e-6))
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False) -> bool:
        for page, row in self._pairs(dst_spec, src_spec):
            page.copy_(row)
        self._done.append(TransferResult(job_id, True, 0, 1e-6))
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: Any) -> None:
        pass

    def shutdown(self) -> None:
        self._pages = self._rows = []
        self._region.cleanup()

    def _pairs(self, pages: Any, rows: Any) -> Any:
        """Each page of the engine with its place in the CPU tier."""
        page = row = 0
        for group, (size, index) in enumerate(zip(pages.group_sizes, pages.block_indices, strict=True)):
            skip = index % self._per_chunk
            for step in range(size):
                chunk, place = divmod(skip + step, self._per_chunk)
                for ref in self._groups[group]:
                    nbytes = ref.page_size_bytes
                    source = self._pages[ref.tensor_idx][int(pages.block_ids[page + step])][:nbytes]
                    target = self._rows[ref.tensor_idx][int(rows.block_ids[row + chunk])]
                    yield source, target[place * nbytes : (place + 1) * nbytes]
            page += size
            row += -(-(skip + size) // self._per_chunk) if size else 0


class CpuTieringSpec(TieringOffloadingSpec):
    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        if not self._worker:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = CopyingWorker(kv_caches, region, self.blocks_per_chunk)
        return self._worker
