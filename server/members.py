"""Which sites are in the run: who they are, whether they fit together, and who comes back after a restart."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from flwr.serverapp import Grid

from giva_core import protocol
from giva_core.config import RunConfig
from giva_core.errors import GivaError, QuorumError
from giva_core.protocol import Hello, Payload
from giva_core.types import SiteRecord

from .absence import BackOff, Bench
from .approved import ApprovedSite, ApprovedSites
from .exchange import Answer, ask

_NODE = "node-"  # what a node is called before it has said its name


@dataclass(frozen=True)
class Member:
    """A site that fits into the run: its Flower node and what it said of itself."""

    node_id: int
    hello: Hello


@dataclass
class Members:
    """The sites of a run.

    Attributes:
        grid: Flower's grid.
        config: The run's configuration.
        admitted: Members by site name.
        turned_away: Reason by node id; such a node is not asked again, a restarted one has a new id. A second node of
            one name is asked again: the first may be gone.
        reference: What all sites must agree on: the first site's schema and digests, by majority.
        back_off: When nodes that did not introduce themselves are asked again.
        bench: Sites that sit out some rounds since they did not answer.
    """

    grid: Grid
    config: RunConfig
    admitted: dict[str, Member] = field(default_factory=dict)
    turned_away: dict[int, str] = field(default_factory=dict)
    reference: Hello | None = None
    back_off: BackOff = field(default_factory=BackOff)
    bench: Bench = field(default_factory=Bench)

    def wait(self) -> None:
        """Wait until `rounds.min-sites` nodes are connected.

        Raises:
            QuorumError: They are not within `rounds.join-seconds`.
        """
        rounds = self.config.rounds
        ends = time.monotonic() + rounds.join_seconds
        while len(connected := set(self.grid.get_node_ids()) - set(self.turned_away)) < rounds.min_sites:
            if time.monotonic() >= ends:
                reasons = "; ".join(sorted(set(self.turned_away.values())))
                raise QuorumError(
                    "too few sites are connected",
                    got=f"{len(connected)} after {rounds.join_seconds:g} s",
                    expected=f"rounds.min-sites = {rounds.min_sites}",
                    cause=f"turned away: {reasons}" if reasons else "sites are not started, or cannot reach the server",
                    remedy="start them, then resume the run",
                )
            time.sleep(min(1.0, rounds.join_seconds / 10))

    def greet(self) -> list[SiteRecord]:
        """Ask every node that is new who it is, and admit those that fit; returns one record for each of them."""
        connected = set(self.grid.get_node_ids())
        self.admitted = {site: member for site, member in self.admitted.items() if member.node_id in connected}
        known = {member.node_id for member in self.admitted.values()} | set(self.turned_away)
        nodes = {f"{_NODE}{node_id}": node_id for node_id in connected - known - self.back_off.resting()}
        if not nodes:
            return []
        question = Payload(values={"config": self.config.digest(), "protocol": protocol.PROTOCOL_VERSION})
        answers = ask(self.grid, nodes, protocol.HELLO, question, deadline_seconds=self.config.rounds.hello_seconds)
        heard = [(answer, *_read_hello(answer)) for answer in answers]
        approved = ApprovedSites().by_node()
        if self.reference is None:
            digest = self.config.digest()
            self.reference = _majority([hello for _, hello, _ in heard if hello and hello.config_digest == digest])
        records = [(answer.node_id, self._admit(answer, hello, reason, approved)) for answer, hello, reason in heard]
        return sorted(_with_unique_names(records), key=lambda record: record.site)

    def _admit(
        self, answer: Answer, hello: Hello | None, reason: str, approved: Mapping[str, ApprovedSite]
    ) -> SiteRecord:
        site = hello.site if hello else answer.site
        if answer.status == "missing":
            self.back_off.missed(answer.node_id)
        else:
            self.back_off.answered(answer.node_id)
        status = "failed" if answer.status == "ok" else answer.status
        # a restarted node may be quicker than Flower is to notice that the one before it is gone: it is asked again
        is_double = site in self.admitted
        if hello:
            reason = _other_name(hello, approved.get(str(answer.node_id))) or self._misfit(hello)
            if not reason:
                self.admitted[site] = Member(answer.node_id, hello)
                self.bench.clear(site)
            else:
                status, site = "refused", f"{site}-{answer.node_id}" if is_double else site
        if reason and answer.status != "missing" and not is_double:
            self.turned_away[answer.node_id] = reason
        return SiteRecord(
            site=site,
            status="ok" if not reason else status,
            reason=reason,
            # what a site says that is turned away has not been checked, not even to fit into the store
            num_examples=hello.num_train if hello and not reason else 0,
            eval_examples=hello.num_eval if hello and not reason else 0,
            bytes_up=answer.bytes_up,
            bytes_down=answer.bytes_down,
        )

    def _misfit(self, hello: Hello) -> str:
        """Why this site cannot take part; empty where it can."""
        wanted, limit = self.reference, self.config.rounds.max_site_examples
        if hello.site.startswith(_NODE):
            return f"its name begins with '{_NODE}', which is what unnamed nodes are called"
        if hello.site in self.admitted:
            return f"another connected node already is site {hello.site}"
        if hello.config_digest != self.config.digest():
            return f"its run configuration {hello.config_digest[:12]}… is not the run's {self.config.digest()[:12]}…"
        if hello.num_train < 1:
            return "it has no training examples"
        if hello.num_train > limit or not 0 <= hello.num_eval <= limit:
            return f"it claims more examples than rounds.max-site-examples = {limit}, or fewer than none"
        if wanted is None:
            return "no site has introduced itself"
        named = {"model_digest": "base model", "state_digest": "starting head", "frozen_digest": "frozen part"}
        for name, what in named.items():
            if getattr(hello, name) != getattr(wanted, name):
                return f"its {what} {getattr(hello, name)[:12]}… is not the others' {getattr(wanted, name)[:12]}…"
        return "" if _form(hello) == _form(wanted) else "its model trains other layers or shapes than the others'"

    def nodes(self, keep: Callable[[Member], bool] = lambda member: True) -> dict[str, int]:
        """Node id by site, sorted by site."""
        return {site: member.node_id for site, member in sorted(self.admitted.items()) if keep(member)}

    def active(self, minimum: int, keep: Callable[[Member], bool] = lambda member: True) -> dict[str, int]:
        """As `nodes`, without those on the bench as long as `minimum` others are left."""
        nodes = self.nodes(keep)
        fit = {site: node_id for site, node_id in nodes.items() if site not in self.bench}
        return fit if len(fit) >= minimum else nodes

    def hellos(self) -> dict[str, Hello]:
        """What each site said of itself."""
        return {site: member.hello for site, member in self.admitted.items()}

    def drop(self, site: str, reason: str) -> None:
        """Take a site out of the run for good."""
        self.turned_away[self.admitted.pop(site).node_id] = reason

    def forget(self, site: str) -> None:
        """Let a site introduce itself again in the next round, e.g. since it lost its bases."""
        self.admitted.pop(site, None)


def _other_name(hello: Hello, approved: ApprovedSite | None) -> str:
    """Why a node may not go by this name; empty where it may, or where its key was approved without one."""
    if approved is None or approved.site == hello.site:
        return ""
    return f"it calls itself {hello.site}, but its key was approved as {approved.site}"


def _read_hello(answer: Answer) -> tuple[Hello | None, str]:
    if answer.payload is None:
        return None, answer.reason
    try:
        return Hello.from_payload(answer.payload), ""
    except GivaError as error:
        return None, str(error)


def _with_unique_names(records: list[tuple[int, SiteRecord]]) -> list[SiteRecord]:
    """An admitted site keeps its name; another record of that name gets its node's id behind it."""
    named: dict[str, SiteRecord] = {}
    for node_id, record in sorted(records, key=lambda pair: pair[1].status != "ok"):
        name = record.site
        while name in named:
            name = f"{name}-{node_id}"
        named[name] = replace(record, site=name)
    return list(named.values())


def _majority(hellos: list[Hello]) -> Hello | None:
    """The hello whose schema and digests most sites share; the first by name among equals."""
    if not hellos:
        return None
    counts = Counter(map(_form, hellos))
    return min(hellos, key=lambda hello: (-counts[_form(hello)], hello.site))


def _form(hello: Hello) -> tuple[object, ...]:
    schema = hello.schema  # its order counts too: arrays travel packed
    digests = hello.model_digest, hello.state_digest, hello.frozen_digest
    return schema.layers, schema.ranks, tuple(schema.state.items()), schema.adapter, schema.form, digests
