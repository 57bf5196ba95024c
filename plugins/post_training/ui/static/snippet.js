// Python that loads a checkpoint.

/** Return the code for a checkpoint's `path`: its model in MLflow, or a folder, which says where its base is. */
export function loadSnippet(path) {
  return [
    "import mlflow",
    "",
    `chat = mlflow.transformers.load_model(${JSON.stringify(path)})`, // a literal of Python, too
    'chat([{"role": "user", "content": "…"}], max_new_tokens=64)',
  ].join("\n");
}
