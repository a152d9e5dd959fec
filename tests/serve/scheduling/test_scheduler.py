"""The scheduler before a real engine in a process of its own: turns, faults, and its end at any moment."""

import asyncio
import io
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from PIL import Image

from switchkd.serve import Engine
from switchkd.serve.scheduling import (
    AnswerFailed,
    Answering,
    AnswerRefused,
    DeadlinePassed,
    EngineDied,
    EngineNotReady,
    EngineOpening,
    Limits,
    Question,
    QueueFull,
    Scheduler,
    ShuttingDown,
)

HI = Question([{"role": "user", "content": "Hi"}], max_new_tokens=5)
LONG = Question([{"role": "user", "content": "Describe what you see."}], max_new_tokens=500_000)


@asynccontextmanager
async def scheduling(bundle: Path, **limits: float) -> AsyncIterator[tuple[Scheduler, list[Answering]]]:
    """A scheduler whose engine is ready, and what it has reported."""
    reported: list[Answering] = []
    scheduler = Scheduler(EngineOpening(bundle, "fp32", 1), Limits(**limits), reported.append)  # type: ignore[arg-type]
    life = asyncio.create_task(scheduler.run())
    try:
        await scheduler.opened
        yield scheduler, reported
    finally:
        scheduler.close()
        await life


async def text(answering: Answering) -> str:
    return "".join([piece.text async for piece in answering])


def test_answers_take_turns_and_a_fault_of_one_is_no_fault_of_others(long_bundle: Path) -> None:
    expected = Engine.open(long_bundle, "fp32", threads=1).answer("Hi", max_new_tokens=5).text

    async def work() -> None:
        async with scheduling(long_bundle, parallel=3, queue=8) as (scheduler, reported):
            long = scheduler.submit(LONG)
            first = await anext(long)
            short = [scheduler.submit(HI) for _ in range(5)]
            wrong = scheduler.submit(Question(HI.messages, [b"no picture"]))
            assert (scheduler.running, scheduler.waiting) == (3, 4)
            assert await asyncio.gather(*map(text, short)) == [expected] * 5
            with pytest.raises(AnswerRefused, match="1 pictures were given"):
                await text(wrong)
            assert first
            assert long.outcome is None
            long.cancel()
            await scheduler.idle()
            assert long.ended is not None  # the engine has said how far it came
            assert 1 <= long.ended.completion_tokens < 500_000
            assert sorted(answering.outcome or "" for answering in reported) == [
                "cancelled",
                *["length"] * 5,
                "refused",
            ]

    asyncio.run(work())


def test_a_question_that_is_let_go_before_it_is_begun(long_bundle: Path) -> None:
    """Waiting, or while its picture is decoded."""
    content = io.BytesIO()
    Image.effect_noise((3000, 3000), 50).save(content, "PNG")
    picture = Question(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}], [content.getvalue()]
    )

    async def work() -> None:
        async with scheduling(long_bundle, parallel=1) as (scheduler, reported):
            decoded, waiting = scheduler.submit(picture), scheduler.submit(HI)
            waiting.cancel()
            assert reported == [waiting]
            await asyncio.sleep(0.02)
            decoded.cancel()
            decoded.cancel()
            await text(scheduler.submit(HI))
            assert [answering.outcome for answering in reported] == ["cancelled", "cancelled", "length"]

    asyncio.run(work())


def test_the_queue_is_bounded_and_deadlines_end_what_waits_too(long_bundle: Path) -> None:
    async def work() -> None:
        async with scheduling(long_bundle, parallel=1, queue=2, deadline=0.5) as (scheduler, _):
            accepted = [scheduler.submit(LONG) for _ in range(3)]
            with pytest.raises(QueueFull) as caught:
                scheduler.submit(HI)
            assert caught.value.retry_after >= 1
            for answering in accepted:
                with pytest.raises(DeadlinePassed):
                    await text(answering)
            await scheduler.idle()
            await text(scheduler.submit(HI))

    asyncio.run(work())


def test_a_dead_engine_is_started_again_however_often(long_bundle: Path) -> None:
    async def work() -> None:
        async with scheduling(long_bundle, parallel=1) as (scheduler, _):
            for deaths in (1, 2):
                running, waiting = scheduler.submit(LONG), scheduler.submit(HI)
                await anext(running)
                assert scheduler.engine_pid is not None
                os.kill(scheduler.engine_pid, signal.SIGKILL)
                for answering in (waiting, running):
                    with pytest.raises(EngineDied):
                        await text(answering)
                with pytest.raises(EngineNotReady):
                    scheduler.submit(HI)
                while scheduler.state != "ready":
                    await asyncio.sleep(0.02)
                assert await text(scheduler.submit(HI))
                assert scheduler.restarts == deaths

    asyncio.run(work())


def test_an_engine_that_does_not_move_is_started_again(long_bundle: Path) -> None:
    async def work() -> None:
        async with scheduling(long_bundle, parallel=1, deadline=0.5) as (scheduler, _):
            assert scheduler.engine_pid is not None
            os.kill(scheduler.engine_pid, signal.SIGSTOP)
            with pytest.raises(DeadlinePassed):
                await text(scheduler.submit(HI))
            while scheduler.restarts == 0 or scheduler.state != "ready":
                await asyncio.sleep(0.02)
            assert await text(scheduler.submit(HI))

    asyncio.run(work())


def test_a_damaged_file_of_a_prefix_fails_its_answer_alone(long_bundle: Path, tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(picture, "PNG")
    content = [{"type": "image"}, {"type": "text", "text": "Hi"}]
    seen = Question([{"role": "user", "content": content}], [picture.getvalue()], max_new_tokens=5)

    async def work() -> None:
        opening = EngineOpening(long_bundle, "fp32", 1, prefix_memory=0, prefix_folder=tmp_path)
        scheduler = Scheduler(opening, Limits(), lambda _: None)
        life = asyncio.create_task(scheduler.run())
        await scheduler.opened
        said = await text(scheduler.submit(seen))
        assert await text(scheduler.submit(seen)) == said
        (file,) = tmp_path.iterdir()
        whole = file.read_bytes()
        file.write_bytes(whole[:-5])
        with pytest.raises(AnswerFailed, match="the server's log says why"):
            await text(scheduler.submit(seen))
        file.write_bytes(whole)
        assert await text(scheduler.submit(seen)) == said
        assert scheduler.restarts == 0
        scheduler.close()
        await life

    asyncio.run(work())


def test_a_bundle_that_cannot_be_opened_is_said_in_its_words(tmp_path: Path) -> None:
    async def work() -> None:
        scheduler = Scheduler(EngineOpening(tmp_path / "none", "fp32"), Limits(), lambda _: None)
        life = asyncio.create_task(scheduler.run())
        with pytest.raises(AnswerRefused, match="none"):
            await scheduler.opened
        await life

    asyncio.run(work())


async def at_once(scheduler: Scheduler) -> None:
    """While the process is being started."""


async def while_opening(scheduler: Scheduler) -> None:
    while scheduler.engine_pid is None:
        await asyncio.sleep(0.001)


async def while_answering(scheduler: Scheduler) -> None:
    await scheduler.opened
    running, waiting = (scheduler.submit(LONG) for _ in range(2))
    await anext(running)
    scheduler.close()
    for answering in (running, waiting):
        with pytest.raises(ShuttingDown):
            await text(answering)


async def while_restarting(scheduler: Scheduler) -> None:
    await scheduler.opened
    assert scheduler.engine_pid is not None
    os.kill(scheduler.engine_pid, signal.SIGKILL)
    while scheduler.state != "restarting":
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("moment", [at_once, while_opening, while_answering, while_restarting])
def test_it_can_be_closed_at_any_moment(long_bundle: Path, moment: Callable[[Scheduler], Awaitable[None]]) -> None:
    async def work() -> None:
        scheduler = Scheduler(EngineOpening(long_bundle, "fp32", 1), Limits(parallel=1), lambda _: None)
        life = asyncio.create_task(scheduler.run())
        await asyncio.sleep(0)
        await moment(scheduler)
        scheduler.close()
        await asyncio.wait_for(life, 20)
        with pytest.raises(ShuttingDown):
            scheduler.submit(HI)
        assert (scheduler.running, scheduler.waiting) == (0, 0)

    asyncio.run(work())
