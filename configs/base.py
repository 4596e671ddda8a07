"""Every field of an experiment, with its meaning and default.

An experiment file calls this get_config() and states the fields that make the experiment, in the
order below. `allattn config --config=FILE` prints all of them with these comments: a comment
belongs to the field that it stands behind, or that it stands directly above.

A new field also needs a row in allattn/config_checks.py.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """All fields; `--config.a.b=value` on the command line overrides one."""
    c = ConfigDict()
    c.seed = 0  # of initialisation, dropout and the stream's offsets; below 2^32
    _add_dataset(c)
    _add_model(c)
    _add_training(c)
    _add_the_rest(c)
    # Locked: a misspelt field in an experiment file is an error.
    return c.lock()


def _add_dataset(c: ConfigDict) -> None:
    c.dataset = ConfigDict()
    c.dataset.name = "enwik8"  # enwik8, text8, wikitext103, stdlib or files
    # folder or bucket URL of prepared data, or for `files` a text, a file or folder;
    # "": $ALLATTN_DATA_DIR or ~/.cache/allattn
    c.dataset.data_dir = ""
    c.dataset.unit = "byte"  # byte, word or bpe (byte pairs); for `files` only
    # of bytes, for `files` and `stdlib` only: value (all 256), or appearance (the papers': in the
    # order in which the training text has them)
    c.dataset.numbering = "value"
    # of words, for `files` only: rarer ones are <unk>; 0: as in the papers, no word is
    c.dataset.min_count = 1
    c.dataset.vocab_size = 4096  # of byte pairs, for `files` only: as many symbols are learnt


def _add_model(c: ConfigDict) -> None:
    c.model = ConfigDict()
    c.model.layer = "all_attention"  # or, with model.persistent 0, transformer or transformer_xl
    # joint: one softmax over context and persistent pairs; others: split, head_split, single_head;
    # sublayer, pattention (pairs in a sublayer of their own); ff_attention (a transformer whose
    # ReLU is a softmax)
    c.model.integration = "joint"
    c.model.depth = 18  # layers
    c.model.width = 512  # of the hidden states (D)
    c.model.heads = 8  # of width / heads each
    c.model.persistent = 1024  # persistent key-value pairs per head (N)
    c.model.persistent_bias = False  # a learned offset of every pair's logit
    # share of the weight that the pairs have at the start, when logits are alike; 0: offset 0
    c.model.persistent_share = 0.0
    # "gain": learned factor on what a head reads from its pairs; "norm": also a norm, where pairs
    # have a softmax of their own; "": neither
    c.model.persistent_gain = ""
    # split and sublayer: 1: pairs as wide as the model; 0: pairs of every head
    c.model.persistent_heads = 0
    c.model.sinks = 0  # pairs per head whose key and value are 0, each with a learned offset
    # inner units; of all_attention beside its pairs, 0: no feed-forward sublayer
    c.model.feed_forward = 0
    c.model.pre_norm = False  # normalise the sublayers' inputs, not their outputs
    c.model.qk_norm = False  # normalise queries, keys and persistent keys of every head
    # learned factors of both sides of every residual, and of the embedding's output, which every
    # layer then gets as well
    c.model.residual_scalars = False
    c.model.output_scale = 1.0  # factor of the initial output projections of all sublayers
    c.model.output_gate = False  # learned gate on the output of every head, from the layer's input
    c.model.vocab_size = 205  # checked against the data; 0: as many as it has
    # on attention weights and after ReLU; transformer_xl: on all except the weights
    c.model.dropout = 0.0
    c.model.attention_dropout = 0.0  # on attention weights; transformer_xl only
    c.model.embedding_dropout = 0.0  # on the embedding's output and the final hidden state
    # of activations and products; parameters and softmax statistics stay float32
    c.model.dtype = "bfloat16"
    c.model.implementation = ""  # of the attention operation; "": the best for the device

    c.model.span = ConfigDict()
    # farthest distance in tokens, rows of the position table (L); transformer_xl: length of the
    # memory
    c.model.span.limit = 8192
    c.model.span.adaptive = True  # False: every head always sees `limit` tokens
    c.model.span.ramp = 32  # length of the soft end in tokens (R)
    c.model.span.init = 0.0  # initial span as a fraction of the limit
    # share of the sum without the soft end that the weights' sum gains: 1e-8 in the papers' models,
    # which convert sets; reference and xla only
    c.model.span.epsilon = 0.0
    c.model.span.loss = 1e-7  # coefficient of limit x mean span, summed over layers
    c.model.span.check_every = 100  # steps between choices of the context length
    # tokens by which the context length exceeds the longest reach when it is chosen
    c.model.span.margin = 32

    c.model.adaptive_io = ConfigDict()
    # first id of each cluster of rarer symbols, as in 20000,40000; (): plain softmax
    c.model.adaptive_io.cutoffs = ()
    c.model.adaptive_io.division = 4  # each cluster's vectors are narrower by this factor
    c.model.adaptive_io.tied = True  # the output uses the embeddings and projections of the input


def _add_training(c: ConfigDict) -> None:
    c.optimizer = ConfigDict()
    # adagrad (the paper's rule), adam, adamw or muon (matrices; adamw for the rest)
    c.optimizer.name = "adagrad"
    c.optimizer.learning_rate = 0.07  # after the warm-up
    # muon only: learning_rate of what is no matrix; 0: as that of matrices
    c.optimizer.adam_rate = 0.0
    c.optimizer.pairs_rate = 1.0  # factor of the rate for the keys of persistent pairs
    c.optimizer.span_rate = 1.0  # factor of the rate for learned spans
    # updates over which the rate rises linearly; too few spoil a wide network
    c.optimizer.warmup = 32_000
    # after the warm-up: constant, or cosine (falling to 0 at train.steps)
    c.optimizer.schedule = "constant"
    # constant only: share of train.steps, the last ones, over which the rate falls linearly to 0
    c.optimizer.cooldown = 0.0
    c.optimizer.clip = 0.03  # gradient norm: per tensor with adagrad, otherwise global; 0: none
    c.optimizer.weight_decay = 0.0  # adamw and muon only

    c.train = ConfigDict()
    c.train.batch = 64  # rows of the stream, over all devices
    c.train.block = 512  # tokens of each row per step
    c.train.accumulation = 1  # parts that a batch is split into, for memory; changes nothing else
    # what the backward pass computes again, for memory: projections (all except attention), layer;
    # "": nothing, on a TPU projections, unless short contexts and a feed-forward sublayer make
    # keeping them the faster way
    c.train.remat = ""
    c.train.init_from = ""  # workdir whose newest parameters this run starts from; "": random ones
    # share of the pairs' weight for pairs that init_from's model lacks or has removed; 0: they are
    # removed, and the function is its own
    c.train.grown_share = 0.0
    c.train.steps = 450_000  # updates
    c.train.finetune_steps = 30_000  # further steps at a tenth of the rate
    # nats by which the loss of a step may exceed the lowest so far; beyond, or where it is not a
    # number, the run goes back to the last good checkpoint and on at half the rate, once; 0: never
    c.train.restore_on_spike = 0.0
    c.train.log_every = 100  # steps
    c.train.profile = 0  # step after which TensorBoard's profiler watches three; 0: none
    # FLOP/s of one device in this dtype, for the MFU metric; 0: not reported
    c.train.peak_flops = 0.0


def _add_the_rest(c: ConfigDict) -> None:
    # Devices along each axis of the mesh; -1: the rest of them.
    c.mesh = ConfigDict()
    c.mesh.data = -1  # rows
    c.mesh.fsdp = 1  # rows, and parameters and optimizer state
    c.mesh.tensor = 1  # heads

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 5_000  # steps
    c.checkpoint.keep = 3  # the last few; the best on dev is kept besides

    c.evaluate = ConfigDict()
    c.evaluate.every = 5_000  # steps between evaluations on dev
    c.evaluate.protocol = "authors"  # authors, full, or for transformer_xl xl
    c.evaluate.batch = 8  # rows that share the work of protocol `full`; `authors` always has 8
    c.evaluate.target_length = 80  # protocol `xl`: tokens of a block
    c.evaluate.memory_length = 2100  # protocol `xl`: distances that every query sees
    c.evaluate.clamp_length = 820  # protocol `xl`: farther ones look like this one; 0: as they are
    c.evaluate.max_tokens = 0  # of dev, for the evaluations while training; 0: all
