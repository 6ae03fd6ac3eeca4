"""Captures that are open across cells, threads and coroutines."""

import asyncio
import gc
import threading
import weakref

import pytest
import torch
from models import Mlp, hooked, hooks_of, tokens

from actctx import CaptureStateError, capture

RESID = "blocks.1.hook_resid_post"


# Open and close.


def test_a_capture_spans_cells(gpt2, ids):
    opened = capture(gpt2, RESID)
    acts = opened.open()
    assert torch.is_grad_enabled(), "code between the cells keeps its grad mode"
    assert not gpt2(ids).requires_grad
    assert acts.tensor.shape == (3, 7, 32)
    gpt2(ids)
    opened.close()
    gpt2(ids)
    assert acts.forwards == 2


def test_a_capture_spans_coroutines_of_a_notebook(gpt2, ids):
    # A kernel runs each cell in a context of its own.
    async def cell(run):
        return run()

    opened = capture(gpt2, RESID)
    acts = asyncio.run(cell(opened.open))
    asyncio.run(cell(lambda: gpt2(ids)))
    asyncio.run(cell(opened.close))
    assert acts.forwards == 1


def test_open_and_close_go_together(mlp):
    opened = capture(mlp, "block")
    with pytest.raises(CaptureStateError):
        opened.close()
    opened.open()
    with pytest.raises(CaptureStateError):
        opened.open()
    opened.close()


def test_what_was_opened_and_dropped_is_collected(mlp):
    before = hooks_of(mlp)
    capture(mlp, "block").open()
    assert hooks_of(mlp) == before


def test_a_buffer_that_was_opened_keeps_its_hooks_on_by_itself(mlp, ids):
    before = hooks_of(mlp)
    acts = capture(mlp, "block").open()
    mlp(ids)
    gc.collect()
    mlp(ids)
    assert acts.tensor.shape == (6, 7, 8)
    del acts
    assert hooks_of(mlp) == before


def test_a_capture_that_is_open_goes_on_without_its_buffer(mlp, ids):
    opened = capture(mlp, "block")
    opened.open()
    mlp(ids)
    opened.close()  # raises where the site did not fire


def test_a_buffer_keeps_no_model_alive_once_its_capture_is_closed(ids):
    model = Mlp()
    opened = capture(model, "block")
    acts = opened.open()
    model(ids)
    opened.close()
    freed = weakref.ref(model)
    del model, opened
    gc.collect()
    assert freed() is None
    assert acts.forwards == 1


# Threads and coroutines.


def test_a_block_that_another_thread_closes_gives_gradients_back_with_the_next(mlp):
    opened = capture(mlp, "block")
    opened.__enter__()
    before = hooks_of(mlp)
    thread = threading.Thread(target=opened.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert hooks_of(mlp) != before
    assert not torch.is_grad_enabled(), "the mode of a thread is out of reach of others"
    with capture(mlp, "block"):
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_a_block_that_another_thread_closes_hands_down_what_it_found(mlp):
    outer, inner = capture(mlp, "block"), capture(mlp, "head")
    outer.__enter__()
    inner.__enter__()
    thread = threading.Thread(target=outer.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert not torch.is_grad_enabled()
    inner.__exit__(None, None, None)
    assert torch.is_grad_enabled()


def test_a_replica_of_a_captured_model_is_refused(mlp, ids):
    with capture(mlp, "block") as acts:
        replica = mlp._replicate_for_data_parallel()
        with pytest.raises(CaptureStateError) as refused:
            replica(ids)
        mlp(ids)
    assert str(refused.value) == (
        "a shallow copy of the Mlp that is captured ran, such as a replica of DataParallel; it "
        "shares the forward and the hooks of the original, so it can neither be captured nor run "
        "by itself; capture from the module that DataParallel wraps, on one device, or run one "
        "process per device; for other copies use copy.deepcopy"
    )
    assert acts.forwards == 1


@pytest.mark.parametrize("name", ["transformer.h.1", "blocks.1.hook_out"])
def test_a_replica_of_a_part_is_refused(gpt2, ids, name):
    root = gpt2 if name.startswith("blocks") else gpt2.original_model
    with capture(root, name) as acts:
        # As DataParallel does, which replicates all modules of a parent.
        replica = root.get_submodule(name)._replicate_for_data_parallel()
        with pytest.raises(CaptureStateError, match="DataParallel"):
            replica(torch.zeros(1, 2, 32))
        root(ids)
    assert acts.forwards == 1


def test_threads_see_their_own_forwards(llama):
    results, barrier = {}, threading.Barrier(4)

    def study(count):
        with capture(llama, "model.layers.1", stop=count % 2 == 0) as acts:
            barrier.wait()
            for step in range(5):
                llama(tokens(count, seed=step))
            barrier.wait()
        results[count] = acts.tensor

    threads = [threading.Thread(target=study, args=(count,)) for count in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for count in (1, 2, 3, 4):
        expected = [hooked(llama, "model.layers.1", tokens(count, seed=step)) for step in range(5)]
        assert torch.equal(results[count], torch.cat(expected))
    assert "forward" not in llama.__dict__


def test_a_thread_without_a_capture_is_left_alone(mlp, ids):
    outputs = []
    with capture(mlp, "block", stop=True) as acts:
        thread = threading.Thread(target=lambda: outputs.append(mlp(ids)))
        thread.start()
        thread.join()
    assert outputs[0].requires_grad
    assert len(acts) == 0


def test_coroutines_see_their_own_forwards(llama):
    async def study(count):
        with capture(llama, "model.layers.1") as acts:
            for step in range(3):
                llama(tokens(count, seed=step))
                await asyncio.sleep(0)
        return acts.tensor

    async def together():
        return await asyncio.gather(*(study(count) for count in (1, 2, 3)))

    for count, found in zip((1, 2, 3), asyncio.run(together()), strict=True):
        expected = [hooked(llama, "model.layers.1", tokens(count, seed=step)) for step in range(3)]
        assert torch.equal(found, torch.cat(expected))


def test_coroutines_that_start_in_a_block_belong_to_it(mlp, ids):
    async def run():
        await asyncio.sleep(0)
        mlp(ids)

    async def together():
        with capture(mlp, "block") as acts:
            await asyncio.gather(run(), run())
        return acts

    assert asyncio.run(together()).forwards == 2
