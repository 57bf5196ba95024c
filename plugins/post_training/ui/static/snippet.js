// Python that loads a checkpoint.

/** Return the code for a checkpoint's `path`; adapters need their base model. */
export function loadSnippet(path, job) {
  const adapter = isAdapter(job);
  const inMlflow = path.startsWith("models:/");
  const lines = [
    ...(inMlflow ? ["import mlflow"] : []),
    ...(adapter ? ["from peft import PeftModel"] : []),
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    inMlflow ? `folder = mlflow.artifacts.download_artifacts(${python(path)})` : `folder = ${python(path)}`,
    ...(adapter ? loadAdapter(job) : ["model = AutoModelForCausalLM.from_pretrained(folder)"]),
    "tokenizer = AutoTokenizer.from_pretrained(folder)",
  ];
  return lines.join("\n");
}

/** Whether the job leaves an adapter, and no model that loads by itself. */
function isAdapter(job) {
  const algorithm = job.algorithm ?? "";
  const trainsOne = /oRA/.test(algorithm) && !algorithm.startsWith("QAT");
  return trainsOne && job.params["runtime.export"] !== "merged";
}

function loadAdapter(job) {
  return [
    '# Of a .gguf file: its folder, and gguf_file="NAME"',
    `model = AutoModelForCausalLM.from_pretrained(${python(job.model ?? "BASE MODEL")})`,
    "model = PeftModel.from_pretrained(model, folder)",
  ];
}

function python(text) {
  return JSON.stringify(String(text)); // is a literal of Python, too
}
