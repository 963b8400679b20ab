"""Write the data set of `recipes/quickstart.yaml`: plain-English requests and the one-line operations command they mean.

    roll payments back to 2.4.1 in production at 5pm on friday  ->  rollback payments@prod 2.4.1 fri 17:00

The command language is made up here, so no base model knows it. The held-out half tests composition, not memory: no
pair of verb and service in it occurs in training, and the services of `NEW_SERVICES` do not occur there at all.

    python scripts/make_quickstart_data.py [--folder recipes/data] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

SYSTEM = "Write the request as one ops command."
TRAIN_SIZE, TEST_SIZE = 1000, 80

SERVICES = (
    "billing", "checkout", "search", "payments", "login", "gateway", "mailer", "catalog", "reports", "uploads",
    "sessions", "pricing", "profiles", "webhooks", "invoices", "orders", "cache", "chat", "imports", "alerts",
)  # fmt: skip
NEW_SERVICES = ("shipping", "refunds", "metrics", "auth", "backups")
ENVIRONMENTS = {"production": "prod", "staging": "stage", "development": "dev"}
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
DURATIONS = {
    "fifteen minutes": "15m", "twenty minutes": "20m", "half an hour": "30m", "three quarters of an hour": "45m",
    "an hour": "60m", "an hour and a half": "90m", "two hours": "120m", "three hours": "180m",
}  # fmt: skip
COUNTS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

PHRASES = {
    "restart": (
        "restart {service} in {env}",
        "please bounce {service} in {env}",
        "{service} in {env} needs a restart",
    ),
    "scale": (
        "scale {service} in {env} to {count} replicas",
        "run {count} copies of {service} in {env}",
        "give {service} {count} replicas in {env}",
    ),
    "rollback": (
        "roll {service} back to {version} in {env}",
        "go back to {service} {version} in {env}",
        "return {service} in {env} to {version}",
    ),
    "deploy": (
        "deploy {service} {version} to {env}",
        "ship version {version} of {service} to {env}",
        "put {service} {version} on {env}",
    ),
    "mute": (
        "silence {service} in {env} for {duration}",
        "no alarms from {service} in {env} for {duration}",
        "mute {env} {service} for {duration}",
    ),
    "logs": (
        "show me {service} logs in {env} going back {duration}",
        "what has {service} logged in {env} for {duration}",
        "fetch {duration} of {env} logs from {service}",
    ),
}
VERBS = tuple(PHRASES)
NOW_OR_LATER = frozenset(VERBS) - {"logs"}
"""Verbs that may name a day and an hour."""


def argument(verb: str, rng: random.Random) -> tuple[str, str, str]:
    """The verb's own argument: its name in the phrases, how it is said, how the command writes it."""
    match verb:
        case "scale":
            number = rng.randrange(len(COUNTS))
            return "count", COUNTS[number], str(number + 2)
        case "rollback" | "deploy":
            version = f"{rng.randrange(1, 10)}.{rng.randrange(10)}.{rng.randrange(10)}"
            return "version", version, version
        case "mute" | "logs":
            return "duration", *rng.choice(list(DURATIONS.items()))
    return "", "", ""


def moment(rng: random.Random) -> tuple[str, str]:
    """A weekday and an hour from 7am to 6pm; the command counts hours to 24."""
    day, hour = rng.choice(DAYS), rng.randrange(7, 19)
    spoken = f"{hour}am" if hour < 12 else "noon" if hour == 12 else f"{hour - 12}pm"
    return rng.choice((f"at {spoken} on {day}", f"on {day} at {spoken}")), f"{day[:3]} {hour:02d}:00"


def held_out(verb: str, service: str) -> bool:
    """Whether this pair belongs to the test set: every fifth of them, so each verb and each service is split."""
    return (VERBS.index(verb) + SERVICES.index(service)) % 5 == 0


def examples(rng: random.Random, pairs: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Endless (request, command) over some pairs of verb and service."""
    while True:
        verb, service = rng.choice(pairs)
        env, env_code = rng.choice(list(ENVIRONMENTS.items()))
        name, spoken, written = argument(verb, rng)
        when, when_code = moment(rng) if verb in NOW_OR_LATER and rng.random() < 0.6 else ("", "")
        request = rng.choice(PHRASES[verb]).format(service=service, env=env, **{name: spoken})
        command = (verb, f"{service}@{env_code}", written, when_code)
        yield f"{request} {when}".strip(), " ".join(filter(None, command))


def take(pairs: Iterator[tuple[str, str]], number: int, seen: set[str]) -> list[tuple[str, str]]:
    """The next `number` pairs whose request is not in `seen`, which grows."""
    taken: list[tuple[str, str]] = []
    while len(taken) < number:
        pair = next(pairs)
        if pair[0] not in seen:
            seen.add(pair[0])
            taken.append(pair)
    return taken


def write(path: Path, pairs: list[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for request, command in pairs:
            roles = (("system", SYSTEM), ("user", request), ("assistant", command))
            record = {"messages": [{"role": role, "content": content} for role, content in roles]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write quickstart-train.jsonl and quickstart-test.jsonl.")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "recipes" / "data")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    known = [(verb, service) for verb in VERBS for service in SERVICES]
    new = [(verb, service) for verb in VERBS for service in NEW_SERVICES]
    seen: set[str] = set()
    train = take(examples(rng, [pair for pair in known if not held_out(*pair)]), TRAIN_SIZE, seen)
    test = take(examples(rng, [pair for pair in known if held_out(*pair)]), TEST_SIZE // 2, seen)
    test += take(examples(rng, new), TEST_SIZE - len(test), seen)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write(arguments.folder / "quickstart-train.jsonl", train)
    write(arguments.folder / "quickstart-test.jsonl", test)
    print(f"{arguments.folder}: {len(train)} examples to train on, {len(test)} held out")


if __name__ == "__main__":
    main()
