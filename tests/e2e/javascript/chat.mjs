// Does with the openai package what programs do with it, and writes what came of it as JSON.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [, , modules, baseURL, apiKey, model, embedder] = process.argv;
const entry = createRequire(modules + "/package.json").resolve("openai");
const { default: OpenAI } = await import(pathToFileURL(entry).href);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Say hello." }];
const asked = { model, messages, max_tokens: 12, temperature: 0 };
const out = {};

const whole = await client.chat.completions.create(asked);
out.whole = whole.choices[0].message.content;
out.usage = whole.usage.completion_tokens;

out.streamed = "";
out.reasons = [];
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  out.streamed += chunk.choices[0].delta.content ?? "";
  out.reasons.push(chunk.choices[0].finish_reason);
}

const helper = client.chat.completions.stream(asked);
out.helped = "";
helper.on("content", (delta) => (out.helped += delta));
out.final = (await helper.finalChatCompletion()).choices[0].message.content;

const parameters = { type: "object", properties: { city: { enum: ["Bern", "Rome"] } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "weather", parameters } }];
const called = await client.chat.completions
  .stream({ ...asked, max_tokens: 120, tools, tool_choice: "required", parallel_tool_calls: false })
  .finalChatCompletion();
const call = called.choices[0].message.tool_calls[0].function;
out.called = [call.name, JSON.parse(call.arguments).city];

const left = await client.chat.completions.create({ ...asked, max_tokens: 1900, stream: true });
for await (const chunk of left) {
  if (chunk.choices[0].delta.content) break;
}

out.models = (await client.models.list()).data.map((one) => one.id);
out.embedding = (await client.embeddings.create({ model: embedder, input: ["w1", "w2 w3"] })).data.map(
  (one) => one.embedding,
);

// It asks for base64 by itself, and gives numbers; asked for numbers it takes them as they come.
out.floats = (
  await client.embeddings.create({ model: embedder, input: "w1", encoding_format: "float" })
).data[0].embedding;
out.retrieved = (await client.models.retrieve(`${model}/versions/1`)).id;

out.errors = {};
for (const [name, wrong] of Object.entries({
  missing: { ...asked, model: "nobody" },
  bad: { ...asked, temperature: 9 },
  version: { ...asked, model: `${model}/versions/9` },
})) {
  try {
    await client.chat.completions.create(wrong);
  } catch (error) {
    out.errors[name] = [error.constructor.name, error.status, error.code, error.param, error.message];
  }
}
try {
  await new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 }).models.list();
} catch (error) {
  out.errors.stranger = [error.constructor.name, error.status, error.code];
}
console.log(JSON.stringify(out));
