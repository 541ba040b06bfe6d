"""THE training loop: restore; step by step, log, evaluate and save when due; finish."""

from __future__ import annotations

from ddptrain import pulse
from ddptrain.errors import DivergenceError, NonFiniteError, Refused, Stopped
from ddptrain.nearest import suggest
from ddptrain.optim.guard import Verdict
from ddptrain.run import Run


class Trainer(Run):
    """The order in which the parts of a run work."""

    def train(self) -> dict[str, float]:
        """Take every step that is left; return the final metrics by name."""
        if self.restore() == 0:
            self.check_metric()  # before a step is taken; later, for metrics are slow to import
        while True:
            try:
                if self.done:
                    self.tend()  # to what was due when the run was stopped
                return self.go_on()
            except DivergenceError as error:
                self.set_right(error)

    def go_on(self) -> dict[str, float]:
        self.fetch()
        while self.done < self.total_steps:
            step = self.done
            with self.layers.watch(step):
                self.step(step, self.batches)
            self.record = self.step.fingerprints.take(step)
            self.advance(step + 1)
            stop = self.heed()
            self.layers.tell(self.done)
            self.observer.fingerprint(self.record)
            if not self.is_warm:
                self.warm_up()
            if stop and self.done < self.total_steps:
                self.stop()
            self.tend()
        return self.finish()

    def fetch(self) -> None:
        """Begin to fetch what this rank trains on from here."""
        place = self.ranks.rank, self.ranks.world_size
        self.batches = self.fetcher.steps(self.done, self.total_steps, *place)
        self.timed_from = self.done
        self.clock.restart()

    def heed(self, wait: bool = False) -> bool:
        """Act on what is known by now of the steps before, the same on every rank.

        Returns whether some rank wants to stop. On a GPU the host is a little behind, but where
        something is due, or it is to ``wait``.
        """
        wait = wait or self.something_is_due()
        stop = False
        for verdict in self.step.heard(self.stop_request.came, wait):
            stop |= verdict.wants_stop
            if verdict.kind:
                self.face(verdict)
        if wait:
            self.replicas.settle()
        return stop

    def face(self, verdict: Verdict) -> None:
        """Go on behind a step at fault, or raise ``NonFiniteError`` with its checkpoint written."""
        before = self.step.rewinds
        self.layers.tell(verdict.step + 1)
        try:
            done = self.setbacks.face(verdict)
        except NonFiniteError:
            self.done, self.metrics, self.record = verdict.step, {}, None
            self.write()
            self.checkpoints.settle()
            raise
        if self.step.rewinds > before:
            self.advance(done)
            self.fetch()
            self.layers.forget()
            if self.record is not None:
                self.record = self.step.fingerprints.take(verdict.step)

    def something_is_due(self) -> bool:
        config = self.config
        return (
            self.record is not None
            or self.layers.seen is not None
            or self.done == self.total_steps
            or self.setbacks.is_due(self.done)
            or any(
                self.is_due(every)
                for every in (
                    config.parallel.check_every_steps,
                    config.log.every_steps,
                    config.eval.every_steps,
                    config.checkpoint.every_steps,
                    config.checkpoint.memory_every_steps,
                )
            )
        )

    def tend(self) -> None:
        """Do what is due after the steps that are done."""
        config = self.config
        if self.setbacks.is_due(self.done):
            self.setbacks.keep(self.state(self.done))
        # A snapshot as well: it is what the ranks go back to, once they are known to have agreed.
        every = config.parallel.check_every_steps, config.checkpoint.memory_every_steps
        if any(map(self.is_due, every)):
            self.replicas.compare(self.done)
        if self.is_due(config.log.every_steps) and not self.line:
            self.log()
        durable = self.is_due(config.checkpoint.every_steps)
        if self.is_due(config.eval.every_steps):
            durable |= self.validate()
        if self.done == self.total_steps:
            return  # it ends early, and is saved then
        if durable:
            self.save()
        elif self.is_due(config.checkpoint.memory_every_steps):
            self.snapshot()

    def is_due(self, every: int | None) -> bool:
        """Whether it is time, but for the last step: what is due then, ``finish`` does."""
        return every is not None and self.done % every == 0 and self.done < self.total_steps

    def warm_up(self) -> None:
        """Begin, once the first step is out, what is needed later."""
        self.is_warm = True
        with self.clock.paused():
            fetchers = [self.fetcher, *(e.fetcher for e in self.evaluations.values())]
            data = {fetcher.source.name: fetcher.digest() for fetcher in fetchers}
            self.ranks.agree(data, "reads other data than", "give all nodes the same files")
            if self.ranks.is_first:
                self.observer.first_step_done(data)

    def log(self) -> None:
        """Reduce what the steps since the last line recorded, and write it down."""
        pulse.enter("log line")
        with self.clock.paused():
            plan = self.fetcher.source.plan
            samples = plan.samples_before(self.done)
            line = self.step.read() | {"samples": samples, "epoch": samples / plan.samples}
            with self.step.gate:
                self.line = line
                self.step.module.window.clear()
            speed = {}
            if self.done > self.timed_from:  # or it was due when the run stopped, or went back
                seconds = self.clock.end_window(self.done - self.timed_from)
                taken = samples - plan.samples_before(self.timed_from)
                speed = {"samples_per_second": taken / seconds}
            self.observer.log(
                self.done, "train", self.line | speed | self.layers.scalars(self.done)
            )
            self.timed_from = self.done
            self.check_metric()

    def check_metric(self) -> None:
        """Refuse a metric to keep the best by, or to go by, that no evaluation will give."""
        if self.metrics_needed:
            names = [f"val/{name}" for name in self.evaluations["val"].names()]
            for key, metric in self.metrics_needed.items():
                if metric not in names:
                    raise Refused(
                        f"{key}={metric}: the task has no such metric{suggest(metric, names)} "
                        "(of built-in tasks, task.metrics says which there are)"
                    )
            self.metrics_needed = {}

    def validate(self) -> bool:
        """Evaluate the validation split; return whether that makes this one of the best."""
        self.check_metric()
        if not self.metrics_of("val"):
            self.evaluate("val")
        is_best = self.ranks.is_first and self.checkpoints.is_among_best(self.done, self.metrics)
        return self.ranks.from_first(is_best)

    def evaluate(self, split: str) -> None:
        with self.clock.paused():
            evaluation = self.evaluations[split]
            evaluation.task = self.evaluated()
            metrics = evaluation.run()
            with self.step.gate:  # a rescue saves both what came of it, or neither
                self.metrics |= {f"{split}/{name}": value for name, value in metrics.items()}
                for each in self.heedful if split == "val" else ():
                    each.heed(self.metrics[each.metric])
            self.observer.log(self.done, split, metrics)
            self.observer.show(self.done, split, evaluation.pictures)
            if self.early_stop is not None and self.early_stop.ran_out:
                self.observer.ends_early(self.done, self.total_steps, self.early_stop.why)
                self.total_steps = self.done

    def stop(self) -> None:
        """Save, and leave what else is due to the start that goes on. Raises ``Stopped``."""
        self.heed(wait=True)
        self.checkpoints.hurry()
        self.save()
        self.checkpoints.settle()
        self.ranks.barrier()  # nobody leaves before it is on disk
        raise Stopped(
            f"stopped after step {self.done} of {self.total_steps} with a checkpoint, on "
            f"{self.stop_request.signal or 'the wish of another rank'}; started again with "
            f"{self.observer.run.argument}, it goes on"
        )

    def finish(self) -> dict[str, float]:
        """Log and evaluate what is not yet, save, and return the final metrics."""
        if not self.line:
            self.log()
        for split in self.evaluations:
            if not self.metrics_of(split):
                self.evaluate(split)
        self.save()
        self.checkpoints.settle()
        if self.ranks.is_first:
            best = self.checkpoints.best_metrics()
            self.observer.finish(self.done, self.metrics, best, self.task.figures)
            self.layers.conclude(self.done)
        return self.metrics
