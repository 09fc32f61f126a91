"""The built-in entries: what a name stands for, in one line, and where it comes from.

A static table, so that listing imports nothing; a test holds every summary and source equal to the class's docstring.
"""

from __future__ import annotations

Line = tuple[str, str, str]  # "module:class", summary, source

BUILT_IN: dict[str, dict[str, Line]] = {
    "attention": {
        "mha": (
            "sparsekit.components.attention:MultiHead",
            "Multi-head attention: as many key-value heads as query heads.",
            "Vaswani et al. 2017, arXiv 1706.03762, sec. 3.2.2",
        ),
        "gqa": (
            "sparsekit.components.attention:GroupedQuery",
            "Grouped-query attention: each of n_kv_heads key-value heads serves n_heads / n_kv_heads query heads.",
            "Ainslie et al. 2023, arXiv 2305.13245",
        ),
        "mqa": (
            "sparsekit.components.attention:MultiQuery",
            "Multi-query attention: one key-value head for all query heads.",
            "Shazeer 2019, arXiv 1911.02150",
        ),
        "mla": (
            "sparsekit.components.attention:MultiHeadLatent",
            "Multi-head latent attention: keys and values come from one low-rank vector c = n(W_dkv x) a token.",
            "DeepSeek-AI 2024, arXiv 2405.04434, eq. 9-19",
        ),
    },
    "kernel": {
        "auto": (
            "sparsekit.components.kernels:Auto",
            "The fastest kernel that can do what is asked: varlen for documents on a GPU, else sdpa, flex or eager.",
            "sparsekit",
        ),
        "sdpa": (
            "sparsekit.components.kernels:SDPA",
            "torch's scaled_dot_product_attention, which picks the fastest backend of the device.",
            "PyTorch",
        ),
        "eager": (
            "sparsekit.components.kernels:Eager",
            "The formula written out, scores and probabilities whole: the reference that every kernel is held against.",
            "Vaswani et al. 2017, arXiv 1706.03762, eq. 1",
        ),
        "flex": (
            "sparsekit.components.fused_kernels:Flex",
            "torch's flex_attention: masks and score changes compiled into one kernel, hidden blocks skipped.",
            "Dong et al. 2024, arXiv 2412.05496",
        ),
        "varlen": (
            "sparsekit.components.fused_kernels:Varlen",
            "torch's varlen_attn: flash attention over packed documents, without a mask of queries by keys.",
            "Dao 2023, arXiv 2307.08691",
        ),
        "flash": (
            "sparsekit.components.fused_kernels:Flash",
            "flash-attn 4 or 2, whichever is installed: exact attention in tiles that never leave the chip.",
            "Dao 2023, arXiv 2307.08691; version 4: Shah et al. 2024, arXiv 2407.08608, and its successors",
        ),
        "xformers": (
            "sparsekit.components.fused_kernels:XFormers",
            "xformers' memory_efficient_attention, which picks cutlass or flash operators.",
            "Rabe & Staats 2021, arXiv 2112.05682; Lefaudeux et al. 2022, xFormers",
        ),
    },
    "normalizer": {
        "softmax": (
            "sparsekit.components.normalizers:Softmax",
            "p = exp(z) / sum exp(z), which every kernel can do.",
            "Vaswani et al. 2017, arXiv 1706.03762, eq. 1",
        ),
        "sparsemax": (
            "sparsekit.components.normalizers:Sparsemax",
            "p = argmin over the simplex of ||p - z||^2, so p = max(0, z - tau).",
            "Martins & Astudillo 2016, arXiv 1602.02068, eq. 2",
        ),
        "entmax15": (
            "sparsekit.components.normalizers:Entmax15",
            "p = max(0, z/2 - tau)^2, the 1.5-entmax, between softmax and sparsemax.",
            "Peters, Niculae & Martins 2019, arXiv 1905.05702, eq. 9",
        ),
    },
    "position": {
        "rope": (
            "sparsekit.components.positions:RoPE",
            "Rotates query and key by their position: pair (i, i + R/2) of R channels turns by position * theta^(-2i/R).",
            "Su et al. 2021, arXiv 2104.09864, eq. 34; partial: Black et al. 2022, arXiv 2204.06745",
        ),
        "alibi": (
            "sparsekit.components.positions:ALiBi",
            "Adds slope_h (key position - query position) to the scores of head h, slopes 2^(-8 h / H) for h = 1 .. H.",
            "Press, Smith & Lewis 2021, arXiv 2108.12409, sec. 3",
        ),
        "learned": (
            "sparsekit.components.positions:Learned",
            "Adds a learned vector for each position and head to query and key, in every layer.",
            "Press, Smith & Lewis 2020, arXiv 2012.15832, sec. 4.1 (position-infused attention)",
        ),
        "none": (
            "sparsekit.components.positions:NoPosition",
            "Leaves query and key as they are; causality alone tells order.",
            "Kazemnejad et al. 2023, arXiv 2305.19466",
        ),
    },
    "rope_scaling": {
        "linear": (
            "sparsekit.components.rope_scalings:Linear",
            "Every frequency divided by factor: positions are squeezed into the trained range.",
            "Chen et al. 2023, arXiv 2306.15595, eq. 4",
        ),
        "ntk": (
            "sparsekit.components.rope_scalings:NTK",
            "theta becomes theta * factor^(R/(R-2)), R the channels that turn: the slowest pair is divided by factor.",
            "Peng et al. 2023, arXiv 2309.00071, def. 1 (NTK-aware interpolation)",
        ),
        "yarn": (
            "sparsekit.components.rope_scalings:YaRN",
            "Pairs that turn often in the trained length stay, those that hardly do are divided by factor, the rest is mixed.",
            "Peng et al. 2023, arXiv 2309.00071, def. 3 and eq. 22",
        ),
        "llama3": (
            "sparsekit.components.rope_scalings:Llama3",
            "Pairs that turn often in the trained length stay, those that hardly do are divided by factor, the rest is mixed.",
            "Grattafiori et al. 2024, arXiv 2407.21783, sec. 3.4.2 (Llama 3.1)",
        ),
    },
    "ffn": {
        "mlp": (
            "sparsekit.components.feedforward:MLP",
            "FFN(x) = W_down act(W_up x).",
            "Vaswani et al. 2017, arXiv 1706.03762, eq. 2",
        ),
        "gated": (
            "sparsekit.components.feedforward:Gated",
            "FFN(x) = W_down (act(W_gate x) * W_up x), with any activation.",
            "Shazeer 2020, arXiv 2002.05202, eq. 6",
        ),
        "swiglu": (
            "sparsekit.components.feedforward:SwiGLU",
            "FFN(x) = W_down (silu(W_gate x) * W_up x).",
            "Shazeer 2020, arXiv 2002.05202, eq. 6",
        ),
        "geglu": (
            "sparsekit.components.feedforward:GEGLU",
            "FFN(x) = W_down (gelu(W_gate x) * W_up x).",
            "Shazeer 2020, arXiv 2002.05202, eq. 6",
        ),
        "reglu": (
            "sparsekit.components.feedforward:ReGLU",
            "FFN(x) = W_down (relu(W_gate x) * W_up x).",
            "Shazeer 2020, arXiv 2002.05202, eq. 6",
        ),
        "drelu": (
            "sparsekit.components.feedforward:DReLU",
            "FFN(x) = W_down (relu(W_gate x) * relu(W_up x)), relu on both branches.",
            "Song et al. 2024, arXiv 2406.05955, eq. 1",
        ),
        "top_k_ffn": (
            "sparsekit.components.feedforward:TopKFeedForward",
            "FFN(x) = W_down TopK_k(relu(W_up x)): of each token's neurons the k largest stay, the rest are 0.",
            "Li et al. 2022, arXiv 2210.06313, sec. 4",
        ),
        "moe": (
            "sparsekit.components.moe:MoE",
            "y_t = sum over the assignments (t, e, w) of w FFN_e(x_t), plus a shared expert that every token visits.",
            "Shazeer et al. 2017, arXiv 1701.06538, eq. 1; shared experts: Dai et al. 2024, arXiv 2401.06066, eq. 9",
        ),
    },
    "activation": {
        "relu": (
            "sparsekit.components.activations:ReLU",
            "max(0, x).",
            "Nair & Hinton 2010, ICML",
        ),
        "relu2": (
            "sparsekit.components.activations:ReLU2",
            "max(0, x)^2.",
            "So et al. 2021, arXiv 2109.08668; sparsity: Zhang et al. 2024, arXiv 2402.03804",
        ),
        "gelu": (
            "sparsekit.components.activations:GELU",
            "x Phi(x), Phi the standard normal distribution function.",
            "Hendrycks & Gimpel 2016, arXiv 1606.08415, eq. 1",
        ),
        "gelu_tanh": (
            "sparsekit.components.activations:GELUTanh",
            "0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the tanh approximation of GELU.",
            "Hendrycks & Gimpel 2016, arXiv 1606.08415, sec. 2",
        ),
        "silu": (
            "sparsekit.components.activations:SiLU",
            "x sigmoid(x).",
            "Elfwing, Uchibe & Doya 2017, arXiv 1702.03118, eq. 3",
        ),
        "shifted_relu": (
            "sparsekit.components.activations:ShiftedReLU",
            "max(0, x - shift).",
            "Mirzadeh et al. 2023, arXiv 2310.04564, sec. 5.3",
        ),
        "fat_relu": (
            "sparsekit.components.activations:FATReLU",
            "x where x > threshold, else 0.",
            "Kurtz et al. 2020, ICML (Inducing and exploiting activation sparsity); Song et al. 2024, arXiv 2402.13516",
        ),
        "clipped_relu": (
            "sparsekit.components.activations:ClippedReLU",
            "min(max(0, x - shift), limit).",
            "Price et al. 2024, arXiv 2402.16184, eq. 3",
        ),
    },
    "router": {
        "top_k": (
            "sparsekit.components.routers:TopK",
            "The k experts of highest score, s = softmax(W x) or sigmoid(W x), weighted by s (renormalised on request).",
            "Shazeer et al. 2017, arXiv 1701.06538; losses: arXiv 2101.03961, eq. 4, and 2202.08906, eq. 5; groups and bias: DeepSeek-AI 2024, arXiv 2412.19437, sec. 2.1.2",
        ),
        "noisy_top_k": (
            "sparsekit.components.routers:NoisyTopK",
            "softmax over the k largest of h = W x + noise, noise ~ N(0, softplus(W_noise x)^2) in training.",
            "Shazeer et al. 2017, arXiv 1701.06538, eq. 3-11",
        ),
        "switch": (
            "sparsekit.components.routers:Switch",
            "The expert of highest probability; an expert takes its first ceil(capacity_factor N / E) tokens, in their order.",
            "Fedus, Zoph & Shazeer 2021, arXiv 2101.03961, eq. 1-6",
        ),
        "expert_choice": (
            "sparsekit.components.routers:ExpertChoice",
            "Each expert takes the ceil(capacity_factor N / E) tokens that score it highest, s = softmax(W x), weighted by s.",
            "Zhou et al. 2022, arXiv 2202.09368, eq. 1-2",
        ),
        "top_p": (
            "sparsekit.components.routers:TopP",
            "The fewest experts, likeliest first, whose softmax probabilities reach p together; weighted by them as they are.",
            "Yang et al. 2024, arXiv 2403.18926, eq. 5-6; Huang et al. 2024, arXiv 2403.07652, eq. 3",
        ),
        "hash": (
            "sparsekit.components.routers:Hash",
            "Experts fixed by a hash of the token's id: k of them, weighted 1/k; nothing is learned.",
            "Roller et al. 2021, arXiv 2106.04426, sec. 3",
        ),
    },
    "norm": {
        "rmsnorm": (
            "sparsekit.components.norms:RMSNorm",
            "y = x / sqrt(mean(x^2) + eps) * weight.",
            "Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4",
        ),
        "layernorm": (
            "sparsekit.components.norms:LayerNorm",
            "y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, the variance biased.",
            "Ba, Kiros & Hinton 2016, arXiv 1607.06450, eq. 4",
        ),
        "dynamic_tanh": (
            "sparsekit.components.norms:DynamicTanh",
            "y = weight tanh(alpha x) + bias, with one learned alpha: no statistics at all.",
            "Zhu et al. 2025, arXiv 2503.10622, eq. 2",
        ),
        "none": (
            "sparsekit.components.norms:NoNorm",
            "y = x, for ablations.",
            "",
        ),
    },
    "residual": {
        "pre_norm": (
            "sparsekit.components.residuals:PreNorm",
            "h = x + s A(n(x)); y = h + s F(n(h)).",
            "Xiong et al. 2020, arXiv 2002.04745, table 1; scale: Hu et al. 2024, arXiv 2404.06395",
        ),
        "post_norm": (
            "sparsekit.components.residuals:PostNorm",
            "h = n(x + s A(x)); y = n(h + s F(h)).",
            "Vaswani et al. 2017, arXiv 1706.03762, sec. 3.1",
        ),
        "peri_norm": (
            "sparsekit.components.residuals:PeriNorm",
            "h = x + s n'(A(n(x))); y = h + s n'(F(n(h))): a norm before and another after each branch.",
            "Kim et al. 2025, arXiv 2502.02732, eq. 4",
        ),
        "output_norm": (
            "sparsekit.components.residuals:OutputNorm",
            "h = x + s n(A(x)); y = h + s n(F(h)): the norm on a branch's output, inside the residual.",
            "OLMo 2 2025, arXiv 2501.00656, eq. 1 and 2",
        ),
        "parallel": (
            "sparsekit.components.residuals:Parallel",
            "y = x + s (A(n(x)) + F(n(x))), both sub-layers reading the same normalised stream.",
            "Wang & Komatsuzaki 2021 (GPT-J); Chowdhery et al. 2022, arXiv 2204.02311, sec. 2",
        ),
        "parallel_two_norms": (
            "sparsekit.components.residuals:ParallelTwoNorms",
            "y = x + s (A(n(x)) + F(n'(x))), each sub-layer with a norm of its own.",
            "Black et al. 2022, arXiv 2204.06745, sec. 2.1 (GPT-NeoX)",
        ),
        "layernorm_scaling": (
            "sparsekit.components.residuals:LayerNormScaling",
            "h = x + s A(n(x) / sqrt(l)); y = h + s F(n(h) / sqrt(l)), which keeps the variance from growing over depth.",
            "Sun et al. 2025, arXiv 2502.05795, eq. 9",
        ),
        "mix_ln": (
            "sparsekit.components.residuals:MixLN",
            "post_norm in the first ``share`` of the layers, pre_norm in the rest.",
            "Li, Yin & Liu 2024, arXiv 2412.13795, eq. 5",
        ),
        "deep_norm": (
            "sparsekit.components.residuals:DeepNorm",
            "h = n(a x + s A(x)); y = n(a h + s F(h)), with a = (2L)^(1/4); pair it with the init deep_norm.",
            "Wang et al. 2022, arXiv 2203.00555, fig. 2 (decoder-only)",
        ),
    },
    "linear": {
        "plain": (
            "sparsekit.components.linears:PlainLinear",
            "y = x W^T + b, a dense projection.",
            "",
        ),
        "masked": (
            "sparsekit.components.linears:MaskedLinear",
            "y = x (M * W)^T + b, M a fixed random mask that keeps a share 1 - sparsity of each matrix's weights.",
            "Liu et al. 2022, arXiv 2202.02643 (random pruning, uniform layer ratio)",
        ),
    },
    "embedding": {
        "token": (
            "sparsekit.components.embeddings:TokenEmbedding",
            "x = scale * table[id].",
            "Vaswani et al. 2017, arXiv 1706.03762, sec. 3.4",
        ),
        "token_and_position": (
            "sparsekit.components.embeddings:TokenAndPositionEmbedding",
            "x = scale * table[id] + positions[t], a learned vector for each position, as in GPT-2.",
            "Radford et al. 2018, Improving Language Understanding by Generative Pre-Training, eq. 2",
        ),
    },
    "init": {
        "normal": (
            "sparsekit.components.inits:Normal",
            "Every weight from N(0, std^2).",
            "Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
        ),
        "trunc_normal": (
            "sparsekit.components.inits:TruncNormal",
            "Every weight from N(0, std^2), cut off at ``cutoff`` standard deviations.",
            "OLMo 2024, arXiv 2402.00838, sec. 3.2",
        ),
        "depth_scaled": (
            "sparsekit.components.inits:DepthScaled",
            "N(0, std^2), but N(0, std^2 / 2L) for what writes to the residual stream (o and down), L the layers.",
            "Radford et al. 2019, Language Models are Unsupervised Multitask Learners, sec. 2.3",
        ),
        "zero_out": (
            "sparsekit.components.inits:ZeroOut",
            "N(0, std^2), but 0 for what writes to the residual stream (o and down): every layer begins as the identity.",
            "Zhang, Dauphin & Ma 2019, arXiv 1901.09321, sec. 3",
        ),
        "deep_norm": (
            "sparsekit.components.inits:DeepNormInit",
            "N(0, std^2), times (8L)^(-1/4) for v, o and the feed-forward: what the residual scheme deep_norm asks for.",
            "Wang et al. 2022, arXiv 2203.00555, fig. 2 (decoder-only)",
        ),
        "mup": (
            "sparsekit.components.inits:MuP",
            "N(0, std^2) at fan-in base_width; matrices scale by sqrt(base_width / fan_in), the head by base_width / fan_in.",
            "Yang et al. 2022, arXiv 2203.03466, table 3",
        ),
    },
    "objective": {
        "next_token": (
            "sparsekit.training.objectives:NextToken",
            "Cross-entropy of the next token, -sum log p(target), in nats.",
            "Bengio et al. 2003, JMLR 3; z-loss: Chowdhery et al. 2022, arXiv 2204.02311, sec. 5",
        ),
    },
    "optimizer": {
        "adamw": (
            "sparsekit.training.optimizers:AdamW",
            "Adam with decoupled weight decay, of matrices only by default (norms, biases and embeddings are not decayed).",
            "Loshchilov & Hutter 2017, arXiv 1711.05101, alg. 2",
        ),
        "muon": (
            "sparsekit.training.muon:Muon",
            "Momentum made orthogonal, for the matrices of hidden layers, one by one in experts; AdamW for all else.",
            "Jordan et al. 2024, Muon: An Optimizer for Hidden Layers in Neural Networks; Liu et al. 2025, arXiv 2502.16982, eq. 4",
        ),
        "lion": (
            "sparsekit.training.lion:Lion",
            "w <- w - lr (sign(b1 m + (1 - b1) g) + decay w), then m <- b2 m + (1 - b2) g: half of Adam's state.",
            "Chen et al. 2023, arXiv 2302.06675, alg. 2",
        ),
        "sgd": (
            "sparsekit.training.optimizers:SGD",
            "m <- momentum m + g + decay w; w <- w - lr m, or with nesterov w <- w - lr (g + decay w + momentum m).",
            "Sutskever et al. 2013, On the Importance of Initialization and Momentum in Deep Learning, sec. 2",
        ),
    },
    "schedule": {
        "constant": (
            "sparsekit.training.schedules:Constant",
            "1 after the warm-up.",
            "",
        ),
        "linear": (
            "sparsekit.training.schedules:Linear",
            "final + (1 - final)(1 - t), with t from 0 to 1 after the warm-up.",
            "Bergsma et al. 2025, arXiv 2502.15938",
        ),
        "cosine": (
            "sparsekit.training.schedules:Cosine",
            "final + (1 - final)(1 + cos(pi t))/2, with t from 0 to 1 after the warm-up.",
            "Loshchilov & Hutter 2016, arXiv 1608.03983, eq. 5",
        ),
        "wsd": (
            "sparsekit.training.schedules:WarmupStableDecay",
            "1, then to final over the last decay_share of the steps: final + (1 - final) d(t), with t from 0 to 1.",
            "Hu et al. 2024, arXiv 2404.06395, sec. 4; 1-sqrt: Hägele et al. 2024, arXiv 2405.18392",
        ),
        "inverse_sqrt": (
            "sparsekit.training.schedules:InverseSqrt",
            "sqrt(T / (T + s)), s the steps (or tokens) after the warm-up and T ``timescale``, or the warm-up's length.",
            "Vaswani et al. 2017, arXiv 1706.03762, eq. 3",
        ),
    },
    "callback": {
        "progress": (
            "sparsekit.training.callbacks:Progress",
            "A progress line with loss, tokens a second and time left; plain lines where there is no terminal.",
            "",
        ),
        "tensorboard": (
            "sparsekit.training.loggers:TensorBoard",
            "Every number of metrics.jsonl as a TensorBoard scalar, in the run's folder tb/; texts, and histograms on request.",
            "",
        ),
        "wandb": (
            "sparsekit.training.loggers:Wandb",
            "Every number of metrics.jsonl, and texts, to Weights & Biases; ``mode`` \"offline\" keeps them in the run's folder.",
            "",
        ),
        "sample": (
            "sparsekit.training.callbacks:Sample",
            "Text that the model writes: printed, and kept in samples.jsonl and by the loggers.",
            "",
        ),
        "profiler": (
            "sparsekit.training.callbacks:Profiler",
            "torch's profiler over a range of steps: a trace for chrome://tracing or Perfetto, and the costliest operators.",
            "",
        ),
    },
    "source": {
        "embedded": (
            "sparsekit.data.sources:Embedded",
            "Jane Austen's six novels, which come with the package: Persuasion is held out as validation, the rest train.",
            "",
        ),
        "text": (
            "sparsekit.data.sources:TextFiles",
            "Plain UTF-8 text files, each one document, or several where a separator line divides them.",
            "",
        ),
        "jsonl": (
            "sparsekit.data.sources:JSONLines",
            "JSON Lines files: one object a line, whose text is in one field.",
            "",
        ),
        "parquet": (
            "sparsekit.data.tables:Parquet",
            "Parquet files: one document a row, whose text is in one column.",
            "",
        ),
        "datasets": (
            "sparsekit.data.tables:Datasets",
            "A data set of the library datasets, from the hub or a local folder, streamed: one document a row.",
            "",
        ),
        "shards": (
            "sparsekit.data.shard_sources:Shards",
            "A folder that ``sparsekit tokenize`` wrote: its tokens are read as they lie there, and no text is encoded.",
            "",
        ),
        "raw_shards": (
            "sparsekit.data.shard_sources:RawShards",
            "Files of nothing but token ids, as OLMo and others keep them: little-endian, an end of text after each document.",
            "",
        ),
        "mix": (
            "sparsekit.data.mixing:Mix",
            "Several sources, mixed in proportion to weights over tokens, or to their sizes where no weights are given.",
            "",
        ),
    },
    "tokenizer": {
        "byte": (
            "sparsekit.data.tokenizers:ByteTokenizer",
            "Each byte of the UTF-8 text is a token, 0 to 255, and 256 ends a text.",
            "Xue et al. 2021, arXiv 2105.13626",
        ),
        "bpe": (
            "sparsekit.data.tokenizers:BPETokenizer",
            "Byte-level byte-pair encoding: bytes, of which the most frequent adjacent pair is merged again and again.",
            "Sennrich, Haddow & Birch 2016, arXiv 1508.07909, alg. 1; on bytes: Radford et al. 2019 (GPT-2), sec. 2.2",
        ),
    },
    "probe": {
        "variance": (
            "sparsekit.probes.variance:Variance",
            "Var_l(X), the mean over tokens of the unbiased variance over channels, of the stream and of both sub-layers.",
            "arXiv 2603.15389, sec. 3.1",
        ),
        "moments": (
            "sparsekit.probes.moments:Moments",
            "Skewness, kurtosis, spread and outliers of the stream and of what both sub-layers add, per layer.",
            "arXiv 2603.15389 (moments, as its training option)",
        ),
        "similarity": (
            "sparsekit.probes.similarity:Similarity",
            "Cosine, angular distance and linear CKA between the streams of all layers, block influence, and the logit lens.",
            "block influence: Men et al. 2024, arXiv 2403.03853, eq. 1; angular: Gromov et al. 2024, arXiv 2403.17887, eq. 7; CKA: Kornblith et al. 2019, arXiv 1905.00414, eq. 5; lens: nostalgebraist 2020",
        ),
        "contributions": (
            "sparsekit.probes.contributions:Contributions",
            "Relative contributions ||attn|| / ||h|| and ||ffn|| / ||h + attn||, and the cosines with what they are added to.",
            "Csordas, Manning & Potts 2025, arXiv 2505.13898, sec. 3",
        ),
        "effective_rank": (
            "sparsekit.probes.effective_rank:EffectiveRank",
            "exp(H(p)), p = s / sum(s), of the singular values s of the stream [tokens, channels] after each layer.",
            "Roy & Vetterli 2007, EUSIPCO, eq. 2",
        ),
        "weight_sparsity": (
            "sparsekit.probes.weight_sparsity:WeightSparsity",
            "How sparse the weights of every matrix are: Gini, Hoyer, kurtosis, ranks, and shares below thresholds.",
            "Hoyer 2004, JMLR 5; Gini: Hurley & Rickard 2009, arXiv 0811.4706; effective rank: Roy & Vetterli 2007",
        ),
        "attention_sparsity": (
            "sparsekit.probes.attention_sparsity:AttentionSparsity",
            "How sparse each head's attention is: shares of small weights, entropy, support, mass on few keys.",
            "entropy: Zhai et al. 2023, arXiv 2303.06296; first token: Xiao et al. 2023, arXiv 2309.17453",
        ),
        "activation_sparsity": (
            "sparsekit.probes.activation_sparsity:ActivationSparsity",
            "How many neurons of a feed-forward are active: exactly, by rank, by gate, or by what perplexity bears (CETT-PPL).",
            "Luo et al. 2024, arXiv 2411.02335, sec. 4.1; CETT: Zhang et al. 2024, arXiv 2402.03804",
        ),
        "sparsity": (
            "sparsekit.probes.sparsity:Sparsity",
            "How sparse weights, attention and activations are: weight_, attention_ and activation_sparsity in one.",
            "sparsekit",
        ),
        "jacobian": (
            "sparsekit.probes.jacobian:Jacobian",
            "Distance of every layer's mean Jacobian from the identity, and of each token's own.",
            "arXiv 2603.15389 (mean Jacobian); Hutchinson 1989 (estimates)",
        ),
        "causal": (
            "sparsekit.probes.causal:Causal",
            "How skipping layer s changes what each later layer l adds: C[s,l] = mean ||f_l^(skip s) - f_l|| / mean ||f_l||.",
            "arXiv 2603.15389, after Csordas, Manning & Potts 2025, arXiv 2505.13898",
        ),
        "permutation": (
            "sparsekit.probes.permutation:Permutation",
            "P(i,j) = |L_swap(i,j) - L| / L, L the loss, and L_swap(i,j) that with layers i and j in each other's place.",
            "arXiv 2603.15389; removal: Men et al. 2024, arXiv 2403.03853",
        ),
        "usefulness": (
            "sparsekit.probes.usefulness:Usefulness",
            "Loss with layer l replaced by the affine least-squares map of its input to its output, over the model's loss.",
            "arXiv 2603.15389",
        ),
        "expert_load": (
            "sparsekit.probes.experts:ExpertLoad",
            "How evenly tokens go to experts, and which experts they visit together.",
            "Shazeer et al. 2017, arXiv 1701.06538, sec. 4; Fedus, Zoph & Shazeer 2021, arXiv 2101.03961, sec. 2.2",
        ),
        "expert_importance": (
            "sparsekit.probes.experts:ExpertImportance",
            "Loss without one expert, and without a mixture's whole sub-layer, less the model's loss; in nats.",
            "",
        ),
    },
    "sparsifier": {
        "cett": (
            "sparsekit.sparsifiers.neurons:Cett",
            "Drops neuron i where its output ||a_i W_down[:, i]|| is below its layer's threshold, Sparsing Law's.",
            "Luo et al. 2024, arXiv 2411.02335, sec. 4.1",
        ),
        "fat_eps": (
            "sparsekit.sparsifiers.neurons:FatEps",
            "Drops neuron i where its gate |act(W_gate x)_i| is at most eps; where there is no gate, |a_i|.",
            "Luo et al. 2024, arXiv 2411.02335, sec. 4.1 (FAT-eps)",
        ),
        "top_k": (
            "sparsekit.sparsifiers.neurons:TopK",
            "Keeps the k largest |a_i| of each token's neurons.",
            "Luo et al. 2024, arXiv 2411.02335, sec. 4.1 (top-k)",
        ),
        "teal": (
            "sparsekit.sparsifiers.inputs:Teal",
            "Drops inputs |x_i| up to the projection's threshold, a quantile of them on the calibration data.",
            "Liu et al. 2024, arXiv 2408.14690, sec. 4.2 and algorithm 1",
        ),
        "wina": (
            "sparsekit.sparsifiers.inputs:Wina",
            "Keeps the inputs with the largest |x_i| ||W[:, i]|| of each token: round((1 - sparsity) d_in), at least one.",
            "Chen et al. 2025, arXiv 2505.19427, sec. 3",
        ),
        "cats": (
            "sparsekit.sparsifiers.gates:Cats",
            "Drops neuron i where its gate |act(W_gate x)_i| is at most its layer's threshold, the sparsity-quantile of them.",
            "Lee et al. 2024, arXiv 2404.08763, eq. 3 and 4",
        ),
        "chess": (
            "sparsekit.sparsifiers.gates:Chess",
            "Drops neuron i where its gate |act(W_gate x)_i| is at most t_i = sqrt(T / E[(W_up x)_i^2]), channel by channel.",
            "He et al. 2024, arXiv 2409.01366, sec. 4",
        ),
    },
}
