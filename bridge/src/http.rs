//! An HTTP/1.1 server on one thread: it accepts, parses, limits, writes, and tells who left. What requests mean is
//! C++'s business.
use std::collections::HashMap;
use std::convert::Infallible;
use std::ffi::c_void;
use std::future::Future;
use std::net::ToSocketAddrs;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{ready, Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::Duration;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{HeaderName, HeaderValue, CONTENT_LENGTH, TRANSFER_ENCODING};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};

use crate::View;

/// What bridge.h calls BridgeHttpLimits.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Limits {
    body_bytes: usize,
    header_bytes: usize,
    headers: usize,
    connections: usize,
    queued_bytes: usize,
    queued_pieces: usize,
    header_seconds: f64,
    body_seconds: f64,
}

/// What bridge.h calls BridgeHttpHandler.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Handler {
    context: *mut c_void,
    request: extern "C" fn(context: *mut c_void, id: u64, head: View, body: View),
    gone: extern "C" fn(context: *mut c_void, id: u64),
}
// C++ promises that both functions may be called from any thread.
unsafe impl Send for Handler {}
unsafe impl Sync for Handler {}

const BACKLOG: u32 = 4096;
/// How long a client may take to read what comes before a stream breaks.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// Whether a connection has written all that it was given.
#[derive(Default)]
struct Flushes {
    count: AtomicU64,
    waiting: Mutex<Option<Waker>>,
}

/// A connection that counts its flushes: hyper flushes when it has written everything.
struct Flushing {
    stream: TcpStream,
    flushes: Arc<Flushes>,
}

impl AsyncRead for Flushing {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Flushing {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        let flushed = ready!(Pin::new(&mut self.stream).poll_flush(cx));
        self.flushes.count.fetch_add(1, Ordering::Relaxed);
        if let Some(waker) = self.flushes.waiting.lock().unwrap().take() {
            waker.wake();
        }
        Poll::Ready(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A stream that is about to break.
struct Breaking {
    flushes: u64, // before
    at_last: Pin<Box<tokio::time::Sleep>>,
}

/// The pieces of one streamed answer that were not written yet.
struct Queue {
    sender: mpsc::UnboundedSender<Result<Bytes, std::io::Error>>,
    bytes: Arc<AtomicUsize>,
    pieces: Arc<AtomicUsize>,
}

enum Exchange {
    Waiting(oneshot::Sender<Response<AnswerBody>>),
    Streaming(Queue),
}

struct Shared {
    handler: Handler,
    limits: Limits,
    exchanges: Mutex<HashMap<u64, Exchange>>,
    next: AtomicU64,
    connections: AtomicUsize,
}

impl Shared {
    fn take(&self, id: u64) -> Option<Exchange> {
        self.exchanges.lock().unwrap().remove(&id)
    }
}

/// Tells C++ that the client of an unfinished exchange left.
struct Departure {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Departure {
    fn drop(&mut self) {
        if self.shared.take(self.id).is_some() {
            (self.shared.handler.gone)(self.shared.handler.context, self.id);
        }
    }
}

/// A whole answer, or one that comes in pieces.
enum AnswerBody {
    Whole(Option<Bytes>),
    Pieces {
        receiver: mpsc::UnboundedReceiver<Result<Bytes, std::io::Error>>,
        bytes: Arc<AtomicUsize>,
        pieces: Arc<AtomicUsize>,
        breaking: Option<Breaking>,
        flushes: Arc<Flushes>,
        _departure: Departure,
    },
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match &mut *self {
            AnswerBody::Whole(data) => Poll::Ready(data.take().map(|data| Ok(Frame::data(data)))),
            AnswerBody::Pieces { receiver, bytes, pieces, breaking, flushes, .. } => {
                if breaking.is_none() {
                    match ready!(receiver.poll_recv(cx)) {
                        None => return Poll::Ready(None),
                        Some(Ok(data)) => {
                            bytes.fetch_sub(data.len(), Ordering::Relaxed);
                            pieces.fetch_sub(1, Ordering::Relaxed);
                            return Poll::Ready(Some(Ok(Frame::data(data))));
                        }
                        Some(Err(_)) => {
                            let at_last = Box::pin(tokio::time::sleep(LAST_WORDS));
                            *breaking = Some(Breaking { flushes: flushes.count.load(Ordering::Relaxed), at_last });
                        }
                    }
                }
                // hyper drops what it has not written when a body fails: it gets the time to write it.
                let breaking = breaking.as_mut().expect("it was set above");
                *flushes.waiting.lock().unwrap() = Some(cx.waker().clone());
                if flushes.count.load(Ordering::Relaxed) == breaking.flushes {
                    ready!(breaking.at_last.as_mut().poll(cx));
                }
                Poll::Ready(Some(Err(std::io::Error::other("the answer failed"))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, AnswerBody::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            AnswerBody::Whole(data) => SizeHint::with_exact(data.as_ref().map_or(0, Bytes::len) as u64),
            AnswerBody::Pieces { .. } => SizeHint::default(),
        }
    }
}

/// `headers`: JSON list of [name, value].
fn response(status: u16, headers: &[u8], body: AnswerBody) -> Result<Response<AnswerBody>, String> {
    let pairs: Vec<(String, String)> = serde_json::from_slice(headers).map_err(|e| format!("headers: {e}"))?;
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).map_err(|e| e.to_string())?;
    for (name, value) in pairs {
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|e| format!("header {name}: {e}"))?;
        let value = HeaderValue::from_str(&value).map_err(|e| format!("header {name}: {e}"))?;
        response.headers_mut().append(name, value);
    }
    Ok(response)
}

fn refusal(status: StatusCode, message: &str) -> Response<AnswerBody> {
    let error = serde_json::json!({"error": {"message": message, "type": "BadRequestError", "param": null, "code": status.as_u16()}});
    let headers = br#"[["content-type", "application/json"], ["connection", "close"]]"#;
    response(status.as_u16(), headers, AnswerBody::Whole(Some(error.to_string().into()))).expect("its parts are constants")
}

async fn read_body(mut body: Incoming, limits: &Limits) -> Result<Bytes, Response<AnswerBody>> {
    let too_large = || refusal(StatusCode::PAYLOAD_TOO_LARGE, &format!("the body: expected {} bytes at most", limits.body_bytes));
    let reading = async {
        let read = Limited::new(&mut body, limits.body_bytes).collect().await;
        if matches!(&read, Err(error) if error.is::<LengthLimitError>()) {
            // Most clients look for an answer when they have sent all: a closed connection in between is all they would see.
            let mut rest = 0;
            while let Some(Ok(frame)) = body.frame().await {
                rest += frame.data_ref().map_or(0, |data| data.len());
                if rest > 8 * limits.body_bytes {
                    break;
                }
            }
        }
        read
    };
    match tokio::time::timeout(Duration::from_secs_f64(limits.body_seconds), reading).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(refusal(StatusCode::BAD_REQUEST, &format!("the body: {error}"))),
        Err(_) => Err(refusal(
            StatusCode::REQUEST_TIMEOUT,
            &format!("the body: expected all of it within {} seconds", limits.body_seconds),
        )),
    }
}

async fn serve(
    request: Request<Incoming>,
    shared: Arc<Shared>,
    of_connection: Arc<Flushes>,
) -> Result<Response<AnswerBody>, Infallible> {
    let (head, body) = request.into_parts();
    if head.headers.contains_key(CONTENT_LENGTH) && head.headers.contains_key(TRANSFER_ENCODING) {
        return Ok(refusal(StatusCode::BAD_REQUEST, "got Content-Length and Transfer-Encoding, expected one of them"));
    }
    let body = match read_body(body, &shared.limits).await {
        Ok(body) => body,
        Err(refused) => return Ok(refused),
    };
    let headers: Vec<(&str, String)> = head
        .headers
        .iter()
        .map(|(name, value)| (name.as_str(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect();
    let text = serde_json::json!({"method": head.method.as_str(), "path": head.uri.path(), "headers": headers}).to_string();
    let id = shared.next.fetch_add(1, Ordering::Relaxed);
    let (sender, receiver) = oneshot::channel();
    shared.exchanges.lock().unwrap().insert(id, Exchange::Waiting(sender));
    let departure = Departure { shared: shared.clone(), id };
    let view = |data: &[u8]| View { data: data.as_ptr().cast(), size: data.len() };
    (shared.handler.request)(shared.handler.context, id, view(text.as_bytes()), view(&body));
    drop(body);
    let mut answer = match receiver.await {
        Ok(answer) => answer,
        Err(_) => refusal(StatusCode::INTERNAL_SERVER_ERROR, "the request was dropped"),
    };
    if let AnswerBody::Pieces { _departure, flushes, .. } = answer.body_mut() {
        *_departure = departure;
        *flushes = of_connection;
    }
    Ok(answer)
}

async fn connection(stream: TcpStream, shared: Arc<Shared>, mut draining: watch::Receiver<bool>) {
    let _ = stream.set_nodelay(true);
    let limits = shared.limits;
    let flushes = Arc::new(Flushes::default());
    let service = {
        let (shared, flushes) = (shared.clone(), flushes.clone());
        service_fn(move |request| serve(request, shared.clone(), flushes.clone()))
    };
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs_f64(limits.header_seconds))
        .max_headers(limits.headers)
        .max_buf_size(limits.header_bytes.max(8192));
    let served = builder.serve_connection(TokioIo::new(Flushing { stream, flushes }), service);
    tokio::pin!(served);
    loop {
        tokio::select! {
            _ = served.as_mut() => break,
            changed = draining.changed() => {
                served.as_mut().graceful_shutdown();
                if changed.is_err() {
                    let _ = served.as_mut().await;
                    break;
                }
            }
        }
    }
    shared.connections.fetch_sub(1, Ordering::Relaxed);
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, mut draining: watch::Receiver<bool>) {
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    if shared.connections.fetch_add(1, Ordering::Relaxed) >= shared.limits.connections {
                        shared.connections.fetch_sub(1, Ordering::Relaxed);
                        continue;
                    }
                    tokio::spawn(connection(stream, shared.clone(), draining.clone()));
                }
                // Too many open files, or a client that left at once.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
            _ = draining.changed() => return,
        }
    }
}

fn listen(host: &str, port: u16) -> Result<TcpListener, String> {
    let fail = |e: std::io::Error| format!("{host}:{port}: {e}");
    let address = (host, port).to_socket_addrs().map_err(fail)?.next().ok_or(format!("{host}: no such address"))?;
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.map_err(fail)?;
    socket.set_reuseaddr(true).map_err(fail)?;
    socket.bind(address).map_err(fail)?;
    socket.listen(BACKLOG).map_err(fail)
}

/// A server that runs.
pub struct Http {
    shared: Arc<Shared>,
    draining: watch::Sender<bool>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    port: u16,
}

impl Http {
    pub fn start(host: &str, port: u16, limits: Limits, handler: Handler) -> Result<Self, String> {
        let shared = Arc::new(Shared {
            handler,
            limits,
            exchanges: Mutex::new(HashMap::new()),
            next: AtomicU64::new(1),
            connections: AtomicUsize::new(0),
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
        let listener = runtime.block_on(async { listen(host, port) })?;
        let port = listener.local_addr().map_err(|e| e.to_string())?.port();
        let (draining, drained) = watch::channel(false);
        let (stop, stopped) = oneshot::channel::<()>();
        let accepting = accept(listener, shared.clone(), drained);
        let connections = shared.clone();
        let thread = std::thread::Builder::new()
            .name("http".into())
            .spawn(move || {
                runtime.block_on(async move {
                    tokio::spawn(accepting);
                    let _ = stopped.await;
                    // What was answered is written.
                    for _ in 0..100 {
                        if connections.connections.load(Ordering::Relaxed) == 0 {
                            break;
                        }
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                });
                runtime.shutdown_background();
            })
            .map_err(|e| e.to_string())?;
        Ok(Http { shared, draining, stop: Some(stop), thread: Some(thread), port })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }

    pub fn respond(&self, id: u64, status: u16, headers: &[u8], body: &[u8]) -> Result<(), String> {
        let answer = response(status, headers, AnswerBody::Whole(Some(Bytes::copy_from_slice(body))))?;
        if let Some(Exchange::Waiting(sender)) = self.shared.take(id) {
            let _ = sender.send(answer);
        }
        Ok(())
    }

    pub fn begin(&self, id: u64, status: u16, headers: &[u8]) -> Result<(), String> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let (bytes, pieces) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        // Replaced by the exchange's own once the answer is on its way.
        let nobody = Departure { shared: self.shared.clone(), id: 0 };
        let body = AnswerBody::Pieces { receiver, bytes: bytes.clone(), pieces: pieces.clone(), breaking: None, flushes: Arc::default(), _departure: nobody };
        let answer = response(status, headers, body)?;
        let mut exchanges = self.shared.exchanges.lock().unwrap();
        if let Some(Exchange::Waiting(waiting)) = exchanges.remove(&id) {
            exchanges.insert(id, Exchange::Streaming(Queue { sender, bytes, pieces }));
            drop(exchanges);
            let _ = waiting.send(answer);
        }
        Ok(())
    }

    /// 0: on its way; 1: the client left; 2: it reads too slowly.
    pub fn send(&self, id: u64, data: &[u8]) -> i32 {
        let exchanges = self.shared.exchanges.lock().unwrap();
        let Some(Exchange::Streaming(queue)) = exchanges.get(&id) else { return 1 };
        let bytes = queue.bytes.fetch_add(data.len(), Ordering::Relaxed) + data.len();
        let pieces = queue.pieces.fetch_add(1, Ordering::Relaxed) + 1;
        if bytes > self.shared.limits.queued_bytes || pieces > self.shared.limits.queued_pieces {
            return 2;
        }
        i32::from(queue.sender.send(Ok(Bytes::copy_from_slice(data))).is_err())
    }

    /// Ends a stream; aborted, its connection breaks without the end that a whole answer has.
    pub fn end(&self, id: u64, abort: bool) {
        if let Some(Exchange::Streaming(queue)) = self.shared.take(id) {
            if abort {
                let _ = queue.sender.send(Err(std::io::Error::other("the answer failed")));
            }
        }
    }

    /// No new connections; those there are close behind their answers.
    pub fn drain(&self) {
        let _ = self.draining.send(true);
    }
}

impl Drop for Http {
    fn drop(&mut self) {
        self.drain();
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
