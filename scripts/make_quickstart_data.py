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
from collections.abc import Callable, Iterator
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

Argument = tuple[str, str]
"""How a person says it, and how the command writes it."""


def duration(rng: random.Random) -> Argument:
    return rng.choice(list(DURATIONS.items()))


def count(rng: random.Random) -> Argument:
    number = rng.randrange(len(COUNTS))
    return COUNTS[number], str(number + 2)


def version(rng: random.Random) -> Argument:
    number = f"{rng.randrange(1, 10)}.{rng.randrange(10)}.{rng.randrange(10)}"
    return number, number


def nothing(rng: random.Random) -> Argument:
    return "", ""


def moment(rng: random.Random) -> Argument:
    """A weekday and an hour from 7am to 6pm; the command counts hours to 24."""
    day, hour = rng.choice(DAYS), rng.randrange(7, 19)
    spoken = f"{hour}am" if hour < 12 else "noon" if hour == 12 else f"{hour - 12}pm"
    written = f"{day[:3]} {hour:02d}:00"
    return rng.choice((f"at {spoken} on {day}", f"on {day} at {spoken}")), written


VERBS: dict[str, tuple[Callable[[random.Random], Argument], tuple[str, ...]]] = {
    "restart": (nothing, ("restart {service} in {env}", "please bounce {service} in {env}", "{service} in {env} needs a restart")),
    "scale": (count, ("scale {service} in {env} to {arg} replicas", "run {arg} copies of {service} in {env}", "give {service} {arg} replicas in {env}")),
    "rollback": (version, ("roll {service} back to {arg} in {env}", "go back to {service} {arg} in {env}", "return {service} in {env} to {arg}")),
    "deploy": (version, ("deploy {service} {arg} to {env}", "ship version {arg} of {service} to {env}", "put {service} {arg} on {env}")),
    "mute": (duration, ("silence {service} in {env} for {arg}", "no alarms from {service} in {env} for {arg}", "mute {env} {service} for {arg}")),
    "logs": (duration, ("show me {service} logs in {env} going back {arg}", "what has {service} logged in {env} for {arg}", "fetch {arg} of {env} logs from {service}")),
}  # fmt: skip


def held_out(verb: str, service: str) -> bool:
    """Whether this pair belongs to the test set: every fifth of them, so each verb and each service is split."""
    return (list(VERBS).index(verb) + SERVICES.index(service)) % 5 == 0


def examples(rng: random.Random, services: tuple[str, ...], wanted: Callable[[str, str], bool]) -> Iterator[Argument]:
    """Endless pairs (request, command) over the wanted pairs of verb and service."""
    while True:
        verb, service = rng.choice(list(VERBS)), rng.choice(services)
        if not wanted(verb, service):
            continue
        argument, phrases = VERBS[verb]
        env, env_code = rng.choice(list(ENVIRONMENTS.items()))
        spoken, written = argument(rng)
        when, when_code = moment(rng) if verb != "logs" and rng.random() < 0.6 else nothing(rng)
        request = rng.choice(phrases).format(service=service, env=env, arg=spoken)
        yield f"{request} {when}".strip(), " ".join(filter(None, (verb, f"{service}@{env_code}", written, when_code)))


def take(pairs: Iterator[Argument], number: int, seen: set[str]) -> list[Argument]:
    """The next `number` pairs whose request is not in `seen`, which grows."""
    taken: list[Argument] = []
    while len(taken) < number:
        pair = next(pairs)
        if pair[0] not in seen:
            seen.add(pair[0])
            taken.append(pair)
    return taken


def write(path: Path, pairs: list[Argument]) -> None:
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
    seen: set[str] = set()
    train = take(examples(rng, SERVICES, lambda verb, service: not held_out(verb, service)), TRAIN_SIZE, seen)
    test = take(examples(rng, SERVICES, held_out), TEST_SIZE // 2, seen)
    test += take(examples(rng, NEW_SERVICES, lambda verb, service: True), TEST_SIZE - len(test), seen)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write(arguments.folder / "quickstart-train.jsonl", train)
    write(arguments.folder / "quickstart-test.jsonl", test)
    print(f"{arguments.folder}: {len(train)} examples to train on, {len(test)} held out")


if __name__ == "__main__":
    main()
