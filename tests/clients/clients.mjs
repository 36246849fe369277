// Clients from npm, with their defaults: package.json. A line of JSON for each check, as in common.py.
import assert from 'node:assert'
import { readFileSync } from 'node:fs'
import { createOpenAI } from '@ai-sdk/openai'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { generateText, Output, streamText, tool } from 'ai'
import OpenAI from 'openai'
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod'
import { z } from 'zod'

const { CLIENTS_URL: baseURL, CLIENTS_MODEL: MODEL } = process.env
const versions = JSON.parse(readFileSync(new URL('package.json', import.meta.url))).dependencies
const [PROMPT, ASKED] = ['Tell me a story about a heron.', 'What is the weather in Bonn?']
const Weather = z.object({ city: z.enum(['Bonn', 'Rome']) })
const place = { baseURL, apiKey: 'secret' }
const user = (content) => ({ role: 'user', content })

async function check(client, name, work) {
  const begun = performance.now()
  const error = await work().then(() => undefined, (raised) => `${raised.name}: ${raised.message}`)
  const row = { client: `${client} (npm)`, version: versions[client], check: name, error }
  console.log(JSON.stringify({ ...row, seconds: (performance.now() - begun) / 1000 }))
}

async function checkFreed() {
  for (let tries = 0; tries < 100; tries++) {
    const health = await fetch(baseURL.replace(/\/v1$/, '/healthz'))
    if (!(await health.json()).running) return
    await new Promise((done) => setTimeout(done, 100))
  }
  assert.fail('the answer goes on')
}

const execute = async ({ city }) => `rain in ${city}`
const tools = { weather: tool({ description: 'The weather', inputSchema: Weather, execute }) }

async function checkSdk(client, model, prefix) {
  await check(client, `${prefix}text and a second turn`, async () => {
    const first = await generateText({ model, prompt: PROMPT })
    assert(first.text)
    const messages = [user(PROMPT), ...first.response.messages, user(ASKED)]
    const providerOptions = { openai: { store: false } } // or it sends references to what it thinks is stored
    assert((await generateText({ model, messages, providerOptions })).text)
  })
  await check(client, `${prefix}stream`, async () => {
    assert(await streamText({ model, prompt: PROMPT, onError() {} }).text)
  })
  await check(client, `${prefix}stream that is left`, async () => {
    const abort = new AbortController()
    const wish = { model, prompt: PROMPT, abortSignal: abort.signal, onError() {} }
    for await (const _ of streamText(wish).textStream) break
    abort.abort()
    await checkFreed()
  })
  await check(client, `${prefix}tools`, async () => {
    assert((await generateText({ model, prompt: ASKED, tools })).finishReason)
  })
  await check(client, `${prefix}forced tool and its answer`, async () => {
    const first = await generateText({ model, prompt: ASKED, tools, toolChoice: 'required' })
    Weather.parse(first.toolCalls[0].input)
    assert((await generateText({ model, messages: [user(ASKED), ...first.response.messages], tools })).finishReason)
    const toolChoice = { type: 'tool', toolName: 'weather' }
    const calls = await streamText({ model, prompt: ASKED, tools, toolChoice, onError() {} }).toolCalls
    Weather.parse(calls[0].input)
  })
  await check(client, `${prefix}JSON schema`, async () => {
    Weather.parse((await generateText({ model, prompt: ASKED, output: Output.object({ schema: Weather }) })).output)
  })
}

await checkSdk('@ai-sdk/openai', createOpenAI(place)(MODEL), 'responses, ')
const compatible = createOpenAICompatible({ ...place, name: 'it', supportsStructuredOutputs: true })
await checkSdk('@ai-sdk/openai-compatible', compatible(MODEL), '')

const { chat, completions, responses } = new OpenAI({ ...place, maxRetries: 0 })
const talk = (content) => ({ model: MODEL, messages: [user(content)] })
const weather = { name: 'weather', parameters: z.toJSONSchema(Weather) }
const asked = { ...talk(ASKED), tools: [{ type: 'function', function: weather }] }
await check('openai', 'chat, stream, completion and responses', async () => {
  assert((await chat.completions.create(talk(PROMPT))).choices[0].message.content)
  assert((await chat.completions.stream(talk(PROMPT)).finalChatCompletion()).choices[0].message.content)
  assert((await completions.create({ model: MODEL, prompt: PROMPT })).usage)
  assert((await responses.create({ model: MODEL, input: PROMPT })).output_text)
})
await check('openai', 'stream that is left', async () => {
  for await (const _ of await chat.completions.create({ ...talk(PROMPT), stream: true })) break
  await checkFreed()
})
await check('openai', 'tools and a JSON schema', async () => {
  assert((await chat.completions.create(asked)).choices[0].finish_reason)
  const form = { ...talk(ASKED), response_format: zodResponseFormat(Weather, 'weather') }
  Weather.parse((await chat.completions.parse(form)).choices[0].message.parsed)
  const wish = { model: MODEL, input: ASKED, text: { format: zodTextFormat(Weather, 'weather') } }
  Weather.parse((await responses.stream(wish).finalResponse()).output_parsed)
})
await check('openai', 'forced tool and its answer', async () => {
  const { message } = (await chat.completions.create({ ...asked, tool_choice: 'required' })).choices[0]
  const [{ id, function: call }] = message.tool_calls
  const result = { role: 'tool', tool_call_id: id, content: await execute(Weather.parse(JSON.parse(call.arguments))) }
  assert(await chat.completions.create({ ...asked, messages: [user(ASKED), message, result] }))
})
