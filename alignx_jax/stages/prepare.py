"""`--stage=prepare`: both stages' data into the cache, and a report on what is in them."""

from __future__ import annotations

import json

from alignx_jax import hosts, storage
from alignx_jax.data import page, report
from alignx_jax.data.examples import Examples
from alignx_jax.stages.session import Session


def prepare(session: Session) -> None:
    """Both stages' data into the cache, and a report on what is in them."""
    found: dict[tuple[str, str], Examples] = {}
    source = session.source(session.config.model)
    source.check()
    encoder = session.tokenizer(source)  # of some models it takes ten seconds
    for stage in ("1", "2"):
        session.console.rule(f"prepare stage {stage}", align="left")
        session.show_source(source)
        for one in session.data(stage, encoder, session.read(stage)).sources:
            found.setdefault((one.corpus.kind, one.corpus.source), one)

    session.console.doing("writing the report")

    def tell() -> None:
        sources = list(found.values())
        facts = report.facts(sources)
        storage.make(session.run)
        storage.write(session.run / "corpus.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        storage.write(session.run / "corpus.html", page.html(facts, sources, session.config.data))
        session.console.print(report.show(facts))

    hosts.first("corpus report", tell)
    session.line("report", f"{session.run / 'corpus.json'}, {session.run / 'corpus.html'}")
    session.line("cache", session.config.data.cache)
