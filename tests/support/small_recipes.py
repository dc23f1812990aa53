"""Command-line arguments that make the recipe quickstart small enough for tests."""

PRETRAIN = [
    "recipe=quickstart",
    "batch_size=2",
    "workers=0",
    "reconstructions=1",
    "weights.contrastive=0",
    "swin.options.embed_dim=16",
    "swin.options.depths=[1,1,1,1]",
    "swin.options.num_heads=[1,2,2,4]",
    "utae.options.encoder_widths=[16,16,32]",
    "utae.options.decoder_widths=[16,16,32]",
    "utae.options.d_model=32",
    "utae.options.n_head=4",
    "masked.decoder.width=32",
    "masked.decoder.fusion_depth=1",
    "engine.log_every=1",
    "engine.optimizer.warmup_steps=1",
]
