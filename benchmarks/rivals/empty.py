"""Rival `empty`: the floor of a FastAPI route. Reads and parses the same body with orjson, answers a constant.

The constant is a real answer of RankTower, so that both send as many bytes: what RankTower takes beyond is its work.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import orjson
from fastapi import FastAPI, Request, Response

from benchmarks.rivals.serving import serve

JSON = "application/json"


def create(answer: bytes) -> FastAPI:
    """The application."""
    app = FastAPI()

    @app.post("/v1/rank")
    async def rank(request: Request) -> Response:
        try:
            orjson.loads(await request.body())
        except orjson.JSONDecodeError as error:
            return Response(orjson.dumps({"detail": str(error)}), 422, media_type=JSON)
        return Response(answer, media_type=JSON)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answer", type=Path, required=True, help="file with the body to send")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    serve(lambda: create(options.answer.read_bytes()), options.port)


if __name__ == "__main__":
    main()
