"""Independent float64 NumPy versions of the losses: loops over the printed equations, for tests only."""

import itertools

import numpy as np


def huber(difference: float) -> float:
    size = abs(difference)
    return 0.5 * size**2 if size <= 1 else size - 0.5


def _pairs(number: int, reduction: str):
    for pair in itertools.product(range(number), repeat=2):
        if reduction == "mean" or len(set(pair)) == 2:
            yield pair


def _triples(number: int, reduction: str):
    for triple in itertools.product(range(number), repeat=3):
        if reduction == "mean" or len(set(triple)) == 3:
            yield triple


def _reduce(values: list[float], reduction: str) -> float:
    total = float(np.sum(values)) if values else 0.0
    return total if reduction == "sum" else total / max(len(values), 1)


def relative_distance(vectors: np.ndarray, u: int, v: int) -> float:
    """Equation (4)."""
    number = len(vectors)
    lengths = [np.linalg.norm(vectors[i] - vectors[j]) for i, j in itertools.permutations(range(number), 2)]
    return float(np.linalg.norm(vectors[u] - vectors[v]) / np.mean(lengths))


def cosine(vectors: np.ndarray, u: int, v: int, w: int) -> float:
    """Equation (7); 0 where an edge has no length."""
    first, second = vectors[u] - vectors[v], vectors[w] - vectors[v]
    lengths = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / lengths) if lengths > 0 else 0.0


def distance_loss(student: np.ndarray, teacher: np.ndarray, reduction: str = "mean") -> float:
    """Equation (5)."""
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    values = [
        0.0 if u == v else huber(relative_distance(student, u, v) - relative_distance(teacher, u, v))
        for u, v in _pairs(len(student), reduction)
    ]
    return _reduce(values, reduction)


def angle_loss(student: np.ndarray, teacher: np.ndarray, reduction: str = "mean") -> float:
    """Equation (8), triple by triple."""
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    values = [
        huber(cosine(student, u, v, w) - cosine(teacher, u, v, w))
        for u, v, w in _triples(len(student), reduction)
    ]
    return _reduce(values, reduction)


def angle_loss_and_gradient(student: np.ndarray, teacher: np.ndarray) -> tuple[float, np.ndarray]:
    """Equation (8) with `mean`, and its gradient by the student: one dense pass a vertex, over unit edges."""
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    number = len(student)
    total, gradient = 0.0, np.zeros_like(student)
    for vertex in range(number):
        unit, length = _unit_edges(student, vertex)
        peer, _ = _unit_edges(teacher, vertex)
        difference = unit @ unit.T - peer @ peer.T
        size = np.abs(difference)
        total += np.where(size <= 1, 0.5 * size**2, size - 0.5).sum()
        slope = np.clip(difference, -1, 1) / number**3
        by_unit = 2 * slope @ unit
        by_edge = by_unit - unit * (unit * by_unit).sum(axis=1, keepdims=True)
        by_edge = np.divide(by_edge, length, out=np.zeros_like(by_edge), where=length > 0)
        gradient += by_edge
        gradient[vertex] -= by_edge.sum(axis=0)
    return float(total / number**3), gradient


def _unit_edges(vectors: np.ndarray, vertex: int) -> tuple[np.ndarray, np.ndarray]:
    edges = vectors - vectors[vertex]
    length = np.linalg.norm(edges, axis=1, keepdims=True)
    return np.divide(edges, length, out=np.zeros_like(edges), where=length > 0), length


def softmax(logits: np.ndarray) -> np.ndarray:
    exponential = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponential / exponential.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Equation (12), per example."""
    return -np.log(softmax(logits)[np.arange(len(labels)), labels])


def softmax_divergence(student: np.ndarray, teacher: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """KL(teacher || student) of equations (3) and (11), per example."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return (p * np.log(p / q)).sum(axis=-1)


def bernoulli_divergence(student: np.ndarray, teacher: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """KL(teacher || student) of one Bernoulli distribution a logit."""
    p, q = sigmoid(teacher / temperature), sigmoid(student / temperature)
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def iou_of_two(a, b):
    """Intersection over union of two boxes (ymin, xmin, ymax, xmax)."""
    height = min(a[2], b[2]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(height, 0.0) * max(width, 0.0)
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / total if total else 0.0
