"""Fits the law to runs, by approach 3 of Hoffmann et al. 2022 (https://arxiv.org/abs/2203.15556, section 3.3): Huber
losses of differences of log losses, the law as a log-sum-exp, many starts, L-BFGS. It owns the optimisation; it refuses
to judge the data (`diagnosis`) and to say how sure the numbers are (`uncertainty`).

Two things are done otherwise, after Besiroglu et al. 2024 (https://arxiv.org/abs/2404.10102), who found that the
paper's own fit had ended early: the Huber losses are summed, not averaged, so that the optimiser's tolerance does not
end it before the minimum; and the variables are centred and scaled by the curvature at the start, since log A and alpha
are almost the same direction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls
from threadpoolctl import ThreadpoolController

from phalanx_server.scaling.law import Law

Vector = NDArray[np.float64]

HUBER_DELTA = 1e-3
"""Differences of log loss above it count linearly: the paper's value."""
Exponents = tuple[float, float]
TRIED = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5)
GRID: tuple[Exponents, ...] = tuple(product(TRIED, TRIED))
"""Starts: alpha and beta; the other three numbers are then a linear problem. The paper's grid is over all
five: 4,500 starts, none of which ends lower in our tests."""
REFINED = 16
"""So many of the starts, those with the least objective, are followed to the end."""
SAME_OBJECTIVE = 1.01
NEGLIGIBLE = 1e-3
"""A term that is nowhere so large a share of the loss was not found in the data."""
LEAST_START = 1e-4
"""No start from the grid has a term that is a smaller share of the loss."""
SEARCHED = 30.0
"""Logarithms beyond it are as good as none or all."""
OPTIONS = {"maxiter": 1000, "maxfun": 3000, "ftol": 1e-11, "gtol": 1e-7, "maxcor": 20}
FLATTEST = 1e-7
"""Directions flatter than this, next to the steepest, are scaled as if they were not."""
BLAS = ThreadpoolController()
"""Its threads wait for each other far longer than five variables take: one is ten times as fast on a busy machine."""


@dataclass(frozen=True)
class Sample:
    """Runs as vectors of one length: parameters, tokens, final loss. All positive."""

    parameters: Vector
    tokens: Vector
    loss: Vector

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, rows: NDArray[np.int64]) -> "Sample":
        """The runs of these rows, with repeats."""
        return Sample(self.parameters[rows], self.tokens[rows], self.loss[rows])


@dataclass(frozen=True)
class Fit:
    """`residuals`: log of observed over fitted loss, per run. `agreeing` of `starts` ended within 1 % of the best
    objective. `missing`: terms (E, A, B) that the data show no trace of."""

    law: Law
    objective: float
    residuals: Vector
    starts: int
    agreeing: int
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """The objective over x = (a, b, e, log alpha, log beta): a, b, e are logs of the three terms at the centre of the
    data."""

    log_n: Vector
    log_d: Vector
    log_loss: Vector
    centre_n: float
    centre_d: float

    @staticmethod
    def of(sample: Sample) -> "Problem":
        log_n, log_d = np.log(sample.parameters), np.log(sample.tokens)
        centre_n, centre_d = float(log_n.mean()), float(log_d.mean())
        return Problem(log_n - centre_n, log_d - centre_d, np.log(sample.loss), centre_n, centre_d)

    def terms(self, x: Vector) -> Vector:
        """(3, runs): logs of the three terms."""
        return np.stack(
            [x[0] - np.exp(x[3]) * self.log_n, x[1] - np.exp(x[4]) * self.log_d, np.full_like(self.log_n, x[2])]
        )

    def __call__(self, x: Vector) -> tuple[float, Vector]:
        """The sum of Huber losses over HUBER_DELTA squared, which is of order 1 per run; and its gradient (5,)."""
        residuals, jacobian = self.linearised(x)
        size = np.abs(residuals) / HUBER_DELTA
        pulls = np.clip(residuals, -HUBER_DELTA, HUBER_DELTA) / HUBER_DELTA**2
        return float(np.where(size <= 1, size**2 / 2, size - 0.5).sum()), jacobian @ pulls

    def linearised(self, x: Vector) -> tuple[Vector, Vector]:
        """(runs,): log of fitted over observed loss; and how each x changes it, (5, runs)."""
        terms = self.terms(x)
        most = terms.max(axis=0)
        shares = np.exp(terms - most)
        total = shares.sum(axis=0)
        shares /= total
        slopes = [-np.exp(x[3]) * self.log_n * shares[0], -np.exp(x[4]) * self.log_d * shares[1]]
        return most + np.log(total) - self.log_loss, np.stack([*shares, *slopes])

    def missing(self, x: Vector) -> tuple[str, ...]:
        _, jacobian = self.linearised(x)
        return tuple(name for name, share in zip("ABE", jacobian[:3], strict=True) if share.max() < NEGLIGIBLE)

    def start(self, alpha: float, beta: float) -> Vector:
        """The best a, b, e for these exponents: non-negative least squares on relative errors."""
        columns = np.stack([np.exp(-alpha * self.log_n), np.exp(-beta * self.log_d), np.ones_like(self.log_n)], axis=1)
        weights = np.exp(-self.log_loss)
        found, _ = nnls(columns * weights[:, None], np.ones_like(weights))
        floor = LEAST_START * np.exp(self.log_loss.mean())  # a term that is 0 has no logarithm
        return np.array([*np.log(np.maximum(found, floor)), np.log(alpha), np.log(beta)])

    def law(self, x: Vector) -> Law:
        a, b, e = map(float, x[:3])
        alpha, beta = float(np.exp(x[3])), float(np.exp(x[4]))
        return Law(
            E=float(np.exp(e)),
            A=float(np.exp(a + alpha * self.centre_n)),
            B=float(np.exp(b + beta * self.centre_d)),
            alpha=alpha,
            beta=beta,
        )

    def point(self, law: Law) -> Vector:
        """The x of a law."""
        a = np.log(law.A) - law.alpha * self.centre_n
        b = np.log(law.B) - law.beta * self.centre_d
        return np.array([a, b, *np.log([law.E, law.alpha, law.beta])])


def fit(sample: Sample, *, near: Sequence[Law] = (), grid: Sequence[Exponents] = GRID, refined: int = REFINED) -> Fit:
    """The law with the least objective found, from the `refined` best starts of the grid and from the laws `near`."""
    problem = Problem.of(sample)
    starts = sorted((problem.start(*pair) for pair in grid), key=lambda x: problem(x)[0])[:refined]
    starts += [problem.point(law) for law in near]
    ends = [_descend(problem, start) for start in starts]
    best, x = min(ends, key=lambda end: end[0])
    return Fit(
        law=problem.law(x),
        objective=best,
        residuals=np.log(sample.loss) - np.log(problem.law(x).loss(sample.parameters, sample.tokens)),
        starts=len(ends),
        agreeing=sum(end[0] <= best * SAME_OBJECTIVE + 1e-15 for end in ends),
        missing=problem.missing(x),
    )


@BLAS.wrap(limits=1, user_api="blas")
def _descend(problem: Problem, start: Vector) -> tuple[float, Vector]:
    """L-BFGS from `start` to where it ends, in variables that are scaled by the curvature there."""
    _, jacobian = problem.linearised(start)
    curvatures, directions = np.linalg.eigh(jacobian @ jacobian.T)
    scale = directions / np.sqrt(np.maximum(curvatures, FLATTEST * curvatures[-1])) * HUBER_DELTA

    def scaled(z: Vector) -> tuple[float, Vector]:
        value, gradient = problem(np.clip(start + scale @ z, -SEARCHED, SEARCHED))
        return value, scale.T @ gradient

    found = minimize(scaled, np.zeros(5), jac=True, method="L-BFGS-B", options=OPTIONS)
    return float(found.fun), np.clip(start + scale @ found.x, -SEARCHED, SEARCHED)
