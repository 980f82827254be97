"""Entities over HTTP; requests that arrive together are computed together: uvicorn --app-dir examples service:app."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain, islice

import spacy
from fastapi import FastAPI, HTTPException, Request
from pydantic import Field, ValidationError, create_model

BODY, TEXTS, LENGTH = 128 * 1024, 64, 10_000  # the most bytes of a request, its texts, the characters of each
WAITING, SECONDS, BATCH = 64, 30, 64  # the most requests that wait, seconds of each in all, texts computed at once
ENTITY = ("text", "label", "start", "end", "score")  # start and end in characters, score is a probability

try:
    nlp = spacy.load(os.environ.get("MODEL", "it_panx_xlmr"))
except (OSError, ValueError) as error:  # a folder has not the code of its pipeline
    raise SystemExit(f"{error} Install its wheel, or set MODEL to another such package's name.") from None
queue: asyncio.Queue[tuple[Request, list[str], asyncio.Future]] = asyncio.Queue(WAITING)
Texts = create_model("Texts", texts=(list[str], Field(max_length=TEXTS)), __config__={"str_max_length": LENGTH})


def compute(jobs: list[list[str]]) -> list[list[list[dict]] | Exception]:
    """The answer to each job's texts; where jobs fail together, each is tried on its own."""
    try:
        with nlp.memory_zone():  # the vocabulary forgets the texts' words after it
            docs = nlp.pipe(chain(*jobs))
            found = ([(e.text, e.label_, e.start_char, e.end_char, e._.panx_score) for e in doc.ents] for doc in docs)
            answers = ([dict(zip(ENTITY, values, strict=True)) for values in entities] for entities in found)
            return [list(islice(answers, len(texts))) for texts in jobs]
    except Exception as error:
        return [error] if len(jobs) == 1 else [answer for texts in jobs for answer in compute([texts])]


async def work() -> None:
    """Answers the waiting requests, leaving out those that timed out or whose client has gone."""
    while jobs := [await queue.get()]:
        while not queue.empty() and sum(len(texts) for _, texts, _ in jobs) < BATCH:
            jobs.append(queue.get_nowait())
        jobs = [job for job in jobs if not job[2].done() and not await job[0].is_disconnected()]
        answers = await asyncio.to_thread(compute, [texts for _, texts, _ in jobs])
        for (_, _, future), answer in zip(jobs, answers, strict=True):
            if not future.done():
                future.set_result(answer)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    worker = asyncio.create_task(work())
    yield  # the server ends this only when all requests have their answers
    worker.cancel()


app = FastAPI(title="Italian named entities", lifespan=lifespan, max_body_size=BODY)
schema = {"requestBody": {"content": {"application/json": {"schema": Texts.model_json_schema()}}}}


@app.post("/entities", openapi_extra=schema)
async def entities(request: Request) -> dict[str, list[list[dict]]]:
    try:
        async with asyncio.timeout(SECONDS):
            texts, future = Texts.model_validate_json(await request.body()).texts, asyncio.Future()
            queue.put_nowait((request, texts, future))
            if isinstance(answer := await future, Exception):
                raise answer
            return {"entities": answer}
    except ValidationError as error:
        raise HTTPException(422, "; ".join(f"body{[*e['loc']]}: {e['msg']}" for e in error.errors()[:3])) from None
    except asyncio.QueueFull:
        raise HTTPException(503, "Too many requests wait; try again in a second.", {"Retry-After": "1"}) from None
    except TimeoutError:
        raise HTTPException(504, f"No answer in {SECONDS} s; send less text, or try again later.") from None


@app.get("/health")
async def health() -> dict[str, str | int]:
    return {"status": "ok", "model": f"{nlp.lang}_{nlp.meta['name']}-{nlp.meta['version']}", "waiting": queue.qsize()}
