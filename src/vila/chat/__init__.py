"""From conversations to token ids: templates as data, one renderer, one tokenizer walk, labels from character spans."""
