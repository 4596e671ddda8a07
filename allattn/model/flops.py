"""Products that the network requires, whatever an implementation computes beyond them."""

from allattn.model.config import ModelConfig


def forward_flops(
    config: ModelConfig, mean_reach: float, block: int, cached: bool = False
) -> float:
    """Required products of one token's forward pass, in FLOPs; training requires three times these.

    With adaptive softmax, tails are left out, since the text decides how many tokens visit them:
    the count is never too high. Sinusoids that Transformer-XL projects are not counted, since all
    rows share them.

    Args:
      config: geometry.
      mean_reach: mean over layers and heads of min(L, span + ramp), in tokens; for Transformer-XL
        the length of its memory.
      block: T, over which the projections of the cached states are shared.
      cached: keys and values of earlier blocks are not projected again.

    Returns:
      Two for each multiplication and addition of `depth` layers and the output, whose parts are
      commented below.
    """
    D = config.width
    # Shares of the heads that attend to the context and that have persistent pairs: all heads do
    # both, but in head_split each does one of them.
    context = config.context_heads / config.heads
    paired = 1.0
    if config.integration == "head_split":
        paired = 1 - context

    # Attention: query.key, weights.value and query.position for every token within reach, and
    # query.key and weights.value for every pair. Transformer-XL's queries also see the tokens of
    # the block up to themselves, (T + 1) / 2 on average.
    own_block = 0.0
    if config.layer == "transformer_xl":
        own_block = (block + 1) / 2
    attention = 2 * D * (3 * (mean_reach + own_block) * context + 2 * config.persistent * paired)

    # Projections: query and output of the token, its key and value, and its share of the keys and
    # values of the cached states.
    from_cache = 0.0
    if not cached:
        from_cache = context * mean_reach / block
    projections = 4 * D * D * (1 + context + from_cache)

    # A gate for every head, from the whole state.
    gates = 0
    if config.output_gate:
        gates = 2 * D * config.heads

    feed_forward = 4 * D * config.feed_forward
    layer = attention + projections + gates + feed_forward
    return config.depth * layer + 2 * D * _columns(config)


def _columns(config: ModelConfig) -> int:
    """Columns of the output's product, each a vector of width D."""
    if not config.cutoffs:
        return config.vocab_size
    # The head has the most frequent symbols and one column for each tail. Clusters that are
    # narrower by a division have two projections of D columns, of the input and the output.
    head = config.cutoffs[0] + len(config.cutoffs)
    if config.division > 1:
        head += 2 * config.width
    return head
