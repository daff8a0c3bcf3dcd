"""Whether the running evaluation of a fit is the last one, as far as the Trainer knows."""

from __future__ import annotations

from typing import Any

__all__ = ["is_last_evaluation", "until_next_evaluation"]

FOREVER = float("inf")


def is_last_evaluation(trainer: Any) -> bool:
    """Whether no further validation is to come in this fit; True outside of a fit.

    Epochs, steps, ``val_check_interval`` and ``check_val_every_n_epoch`` count. What decides later does not
    (``EarlyStopping``, ``max_time``), and under several optimizers steps are taken for batches.
    """
    if trainer.state.fn != "fit" or trainer.should_stop:
        return True
    batches = float(trainer.num_training_batches)
    done = float(trainer.fit_loop.epoch_loop.batch_progress.current.ready)
    left = FOREVER
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        left = (trainer.max_epochs - trainer.current_epoch - 1) * batches + batches - done
        if batches == FOREVER:
            left = 0.0 if trainer.current_epoch + 1 >= trainer.max_epochs else FOREVER
    if trainer.max_steps >= 0:
        left = min(left, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    return left < until_next_evaluation(trainer.current_epoch, done, batches, float(every), epochs)


def until_next_evaluation(epoch: int, done: float, batches: float, every: float, epochs: int | None) -> float:
    """Batches until the validation after the present one.

    Args:
        epoch: Whole epochs done before this one.
        done: Batches of this epoch so far.
        batches: Of an epoch; infinite where that is not known.
        every: Batches between validations; infinite for the end of the epoch.
        epochs: Validations are in every so many epochs; None where batches are counted over epochs.

    Example:
        >>> until_next_evaluation(epoch=0, done=4, batches=4, every=4, epochs=2)  # then in the second epoch
        4
        >>> until_next_evaluation(epoch=0, done=2, batches=8, every=2, epochs=1)
        2
    """
    if epochs is None:
        return every
    if epochs == 1 or (epoch + 1) % epochs == 0:
        if done + every <= batches and every != FOREVER:
            return every
        skipped = epochs - 1
    else:
        skipped = epochs - (epoch + 1) % epochs - 1
    if batches == FOREVER:
        return 1  # the next epoch has some
    return (batches - done) + skipped * batches + min(every, batches)
