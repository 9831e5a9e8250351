package uplink

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// fetchStall ends a download on which no byte came for so long.
const fetchStall = time.Minute

// newFilesClient makes the client for model files. Only the hub is ever asked: redirects are errors, since the request
// carries the edge's token.
func newFilesClient(t *tls.Config) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:       t,
			DialContext:           (&net.Dialer{Timeout: 15 * time.Second}).DialContext,
			TLSHandshakeTimeout:   15 * time.Second,
			ResponseHeaderTimeout: 30 * time.Second,
			IdleConnTimeout:       30 * time.Second,
			MaxConnsPerHost:       4,
			DisableCompression:    true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// Fetch opens a model file ("sha256:<hex>") of the hub at an offset. It fails with ErrNoLink at once when there is no
// link. The reader fails when no byte comes for a minute; the caller checks the digest.
func (u *Uplink) Fetch(ctx context.Context, digest string, offset int64) (io.ReadCloser, error) {
	if u.cfg.FilesURL == "" {
		return nil, errors.New("model files have no address: set hub.files to the hub's http:// or https:// address")
	}
	u.mu.Lock()
	linked := u.conn != nil
	u.mu.Unlock()
	if !linked {
		return nil, ErrNoLink
	}
	ctx, cancel := context.WithCancelCause(ctx)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(u.cfg.FilesURL, "/")+"/models/"+digest, nil)
	if err != nil {
		cancel(nil)
		return nil, fmt.Errorf("fetch model file: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+u.cfg.Edge+":"+u.cfg.Token)
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
	resp, err := u.files.Do(req)
	if err != nil {
		cancel(nil)
		return nil, fmt.Errorf("fetch model file: %w", err)
	}
	if err := checkRange(resp, offset); err != nil {
		err = errors.Join(err, resp.Body.Close())
		cancel(nil)
		return nil, err
	}
	return &body{
		ReadCloser: resp.Body, cancel: cancel, cause: func() error { return context.Cause(ctx) },
		stall: time.AfterFunc(fetchStall, func() { cancel(fmt.Errorf("fetch model file: no byte came for %s", fetchStall)) }),
	}, nil
}

func checkRange(resp *http.Response, offset int64) error {
	switch resp.StatusCode {
	case http.StatusPartialContent:
		if want := fmt.Sprintf("bytes %d-", offset); !strings.HasPrefix(resp.Header.Get("Content-Range"), want) {
			return fmt.Errorf("fetch model file: the hub sent range %q instead of one from byte %d", resp.Header.Get("Content-Range"), offset)
		}
		return nil
	case http.StatusOK:
		if offset > 0 {
			return fmt.Errorf("fetch model file: the hub ignored the range from byte %d: is something in between that does not pass ranges on?", offset)
		}
		return nil
	}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 512)) // best effort: it only words the error
	return fmt.Errorf("fetch model file: the hub answered %s: %s", resp.Status, strings.TrimSpace(string(text)))
}

// body is a response's body that ends when nothing comes any more.
type body struct {
	io.ReadCloser
	stall  *time.Timer
	cancel context.CancelCauseFunc
	cause  func() error // why the request was cancelled, nil if it was not
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.stall.Reset(fetchStall)
	}
	if cause := b.cause(); cause != nil && err != nil && !errors.Is(err, io.EOF) {
		err = cause
	}
	return n, err
}

func (b *body) Close() error {
	b.stall.Stop()
	err := b.ReadCloser.Close()
	b.cancel(nil)
	return err
}
