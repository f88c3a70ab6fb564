"""γ of a half-life: the one formula, in a module that needs no torch."""


def half_life_to_gamma(tau: float) -> float:
    """γ = 2^(-1/τ): a token τ positions ahead counts half. arXiv 2606.12384, Eq. 4.

    Raises ValueError for τ ≤ 0.

    >>> half_life_to_gamma(1)
    0.5
    """
    if not tau > 0:
        raise ValueError(f"half-life is {tau}, expected > 0 tokens")
    return 2.0 ** (-1.0 / tau)
