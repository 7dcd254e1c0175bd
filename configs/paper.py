"""The paper's own size and settings, as far as it states them (docs/paper_ledger.md): for accelerators.

python train.py --config=configs/paper.py --config.data.manual_dir=EXPORT --workdir=runs/paper

12 blocks, 768 hidden, 12 heads, SGD with rate 0.24, 800 epochs, tasks weighted 1 each, on a hospital's own export (the
paper's set is private). Two networks of 330 M parameters: not meant for a CPU, where one step of 2 clips takes
minutes. What rate 0.24 does is in docs/results/ablation.md.
"""

from dilbert_jax.config import default_config


def get_config():
    config = default_config("base")
    config.data.update(name="ahjuui", size=128, num_frames=128, stored_frames=128, max_tokens=128)
    config.data.update(vocab_size=8000, report_dropout=0.0)
    config.optimizer.update(name="sgd", learning_rate=0.24, momentum=0.9, weight_decay=1e-4)
    config.loss.update(mlm=1.0, mdc=1.0, moc=1.0, cmm=1.0, summary=0.0)
    config.loss.update(organ=1.0, condition=1.0, findings=1.0, match=1.0, grounding=1.0)
    config.train.update(batch_size=32, teacher_epochs=800.0, student_epochs=800.0, mutual_epochs=4.0)
    return config
