// Python that loads a checkpoint.

/**
 * Return the code for a checkpoint's `path`: its model in MLflow, or a folder, which says where its base is.
 * `runUrl` is the page of its run, below the address of MLflow.
 */
export function loadSnippet(path, runUrl) {
  const server = path.startsWith("models:/") && runUrl ? runUrl.split("/#")[0] : null;
  return [
    "import mlflow",
    "",
    ...(server ? [`mlflow.set_tracking_uri(${JSON.stringify(server)})`] : []),
    `chat = mlflow.transformers.load_model(${JSON.stringify(path)})`, // a literal of Python, too
    'chat([{"role": "user", "content": "…"}], max_new_tokens=64)',
  ].join("\n");
}
